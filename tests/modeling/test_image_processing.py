"""Image processors that replace timm's, against timm's transforms."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    ConvNextConfig,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from hf_rtl import RTLModel, RTLModelForImageClassification, image_processor_from_timm


CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
GRAY = {"input_size": (1, 28, 28), "mean": (0.1,), "std": (0.3,)}
# Changes to CONFIG, size of the image, scaled size (width, height), pixels before timm's crop (x, y)
CASES = [
    ({}, (40, 40), (36, 36), (0, 0)),
    ({"interpolation": "bilinear"}, (90, 72), (45, 36), (0, 0)),
    ({"interpolation": "bilinear"}, (72, 94), (36, 47), (0, 1)),
    ({"crop_pct": 1.0}, (33, 36), (32, 34), (0, 0)),
    ({"crop_pct": 1.0}, (39, 32), (39, 32), (1, 0)),
    ({"input_size": (3, 64, 64), "crop_pct": 0.9}, (200, 100), (142, 71), (0, 1)),
    ({"input_size": (3, 48, 24), "crop_pct": 1.0, "crop_mode": "squash"}, (31, 47), (24, 48), (0, 0)),
    ({"input_size": (3, 48, 32), "crop_pct": 0.9, "crop_mode": "squash"}, (60, 50), (35, 53), (1, 0)),
    (GRAY, (60, 60), (32, 32), (0, 0)),
]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(size, num_channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels if num_channels == 3 else pixels[..., 0])


def pixel_values(processor, image):
    return processor(image, return_tensors="pt").pixel_values[0]


@pytest.mark.parametrize("changes, size, scaled, early", CASES)
def test_pixels_are_those_of_timm(changes, size, scaled, early):
    config = {**CONFIG, **changes}
    num_channels, height, width = config["input_size"]
    image = noise(size, num_channels)
    large = np.asarray(image.resize(scaled, FILTERS[config["interpolation"]]), dtype=np.float32).reshape(
        scaled[1], scaled[0], num_channels
    )

    def cut(x, y):
        pixels = torch.from_numpy(large[y : y + height, x : x + width].transpose(2, 0, 1)) / 255
        return (pixels - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]

    x, y = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    assert torch.equal(create_transform(**config)(image), cut(x, y))
    for source in (config, TimmWrapperImageProcessor(pretrained_cfg=config)):
        given = pixel_values(image_processor_from_timm(source), image)
        assert torch.allclose(given, cut(x - early[0], y - early[1]), rtol=0, atol=1e-6)
    assert early == (0, 0) or not torch.allclose(given, cut(x, y), atol=0.1)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 8)])
def test_what_is_loaded_again_differs_in_the_rounding_of_pixels(tmp_path, interpolation, most):
    config = {**CONFIG, "input_size": (3, 224, 224), "interpolation": interpolation}
    image_processor_from_timm(config).save_pretrained(tmp_path)
    as_it_was = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    deviation = torch.tensor(config["std"])[:, None, None]
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels[:400, :600])  # scaled to 256 x 384
        expected = create_transform(**config)(photo)
        assert torch.allclose(pixel_values(as_it_was, photo), expected, rtol=0, atol=1e-6)
        levels = ((pixel_values(loaded, photo) - expected) * deviation * 255).abs()
        assert levels.max() < most + 0.01 and levels.mean() < 0.02


def test_the_processor_of_a_timm_model_without_a_repository(tiny_membership_model):
    config = resolve_model_data_config(tiny_membership_model.backbone.timm_model)
    assert config["input_size"] == (3, 160, 160) and config["mean"] == (0.5, 0.5, 0.5)
    image = noise((200, 168))  # crop_pct = 0.95 keeps this size
    assert torch.allclose(pixel_values(image_processor_from_timm(config), image), create_transform(**config)(image))


def test_images_of_other_modes_are_converted():
    processor = image_processor_from_timm(CONFIG)
    for mode in ("L", "RGBA", "P"):
        assert pixel_values(processor, noise((40, 40)).convert(mode)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop_mode": "border"}, "`crop_mode` = 'border'.*'squash', or with 'center' if they are square"),
        ({"input_size": (3, 32, 48)}, "`crop_mode` = 'center' with an `input_size` of 32 x 48"),
        ({"interpolation": "lanczos"}, "`interpolation` = 'lanczos'.*'bilinear' or 'bicubic'"),
        ({"input_size": (4, 32, 32)}, "has 4 channels, allowed are 1 and 3"),
        ({"input_size": (1, 32, 32)}, r"`mean` = .* has 3 value\(s\) for 1 channel"),
        ({"std": (1.0,)}, r"`std` = .* has 1 value\(s\) for 3 channel"),
        ({"crop_border_pixels": 2}, "see `crop_border_pixels`"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        image_processor_from_timm({**CONFIG, **changes})


def test_an_incomplete_configuration_is_refused():
    with pytest.raises(ValueError, match="see `crop_mode`, `crop_pct`.*resolve_data_config"):
        image_processor_from_timm({name: CONFIG[name] for name in ("input_size", "interpolation", "mean", "std")})


# Saving along with a model


def test_a_model_saves_a_processor_along(tiny_membership_model, tmp_path):
    tiny_membership_model.save_pretrained(tmp_path / "image", processing_class=TimmWrapperImageProcessor(CONFIG))
    saved = AutoImageProcessor.from_pretrained(tmp_path / "image", backend="pil")
    image = noise((40, 40))
    assert torch.allclose(pixel_values(saved, image), create_transform(**CONFIG)(image), rtol=0, atol=1e-6)
    assert RTLModel.from_pretrained(tmp_path / "image").mask_bank.fingerprint()

    (tmp_path / "words.txt").write_text("[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\nbee\n")
    tokenizer = BertTokenizer(str(tmp_path / "words.txt"))
    tiny_membership_model.save_pretrained(tmp_path / "text", processing_class=tokenizer)
    assert (tmp_path / "text" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    "processing_class, error, message",
    [
        (TimmWrapperImageProcessor({**CONFIG, "crop_mode": "border"}), ValueError, "`crop_mode` = 'border'"),
        (create_transform(**CONFIG), TypeError, "with a `save_pretrained`, got Compose; in place of timm"),
    ],
)
def test_a_processor_that_cannot_be_saved_leaves_the_folder_alone(
    tiny_membership_model, tmp_path, processing_class, error, message
):
    with pytest.raises(error, match=message):
        tiny_membership_model.save_pretrained(tmp_path / "model", processing_class=processing_class)
    assert list(tmp_path.iterdir()) == []


CONVNEXT = ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=224, num_labels=3)
GRAY_PROCESSOR = image_processor_from_timm({**CONFIG, **GRAY})


@pytest.mark.parametrize(
    "backbone, processor, warned",
    [
        ("test_resnet", GRAY_PROCESSOR, "images of 1 x 28 x 28 .*says 3 x 160 x 160"),
        ("test_resnet", image_processor_from_timm(CONFIG), ""),
        ("test_vit", image_processor_from_timm(CONFIG), ""),  # timm's test_vit takes images of any size
        ("fixed_vit", image_processor_from_timm(CONFIG), "images of 3 x 32 x 32 .*says 3 x 160 x 160"),
        ("vit", ViTImageProcessor(size={"height": 16, "width": 16}), "images of 3 x 16 x 16 .*says 3 x 8 x 8"),
        ("vit", ViTImageProcessor(size={"height": 8, "width": 8}), ""),
        ("vit", ViTImageProcessor(do_resize=False), ""),
        (CONVNEXT, image_processor_from_timm(CONFIG), ""),
    ],
)
def test_a_processor_that_contradicts_the_backbone_is_warned_of_once(
    backbone, processor, warned, tiny_vit_config, tmp_path, caplog
):
    backbone = tiny_vit_config if backbone == "vit" else backbone
    if backbone == "fixed_vit":
        backbone = TimmWrapperConfig(architecture="test_vit", model_args={"dynamic_img_size": False})
    model = RTLModelForImageClassification.from_backbone(backbone, route_names=["x", "y"], ticket_task="labels")
    caplog.clear()
    model.save_pretrained(tmp_path, processing_class=processor)
    (tmp_path / "words.txt").write_text("[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\n")
    model.save_pretrained(tmp_path, processing_class=BertTokenizer(str(tmp_path / "words.txt")))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(warned) and all(re.search(warned, message) for message in messages)
