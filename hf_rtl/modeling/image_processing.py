"""Image processors: ordinary ones in place of timm's own, which cannot be saved, and the images that they make."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BaseImageProcessor, BitImageProcessorPil, PreTrainedModel, TimmWrapperImageProcessor
from transformers.image_utils import PILImageResampling


logger = logging.getLogger(__name__)

_INTERPOLATIONS = {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}
_KEYS = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


def savable_processor(processing_class: Any) -> Any:
    """
    A tokenizer, feature extractor or image processor that can be saved: the given one, or, in place of timm's,
    [`image_processor_from_timm`]. `None` for `None`.

    Raises:
        TypeError: it has no `save_pretrained`.
        ValueError: see `image_processor_from_timm`.
    """
    if isinstance(processing_class, TimmWrapperImageProcessor):
        return image_processor_from_timm(processing_class)
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise TypeError(
            "`processing_class` must be a tokenizer, feature extractor or image processor, with a `save_pretrained`, "
            f"got {type(processing_class).__name__}; in place of timm transforms, pass "
            "`image_processor_from_timm(data_config)` with the data configuration that they were made from."
        )
    return processing_class


def image_processor_from_timm(source: TimmWrapperImageProcessor | Mapping[str, Any]) -> BitImageProcessorPil:
    """
    An image processor of transformers that does what timm's transform for evaluation does, and can be saved.

    Its pixels are timm's, except where the two round the middle of an image differently: along a side that 3, 7, 11, …
    pixels are cut from, the crop lies one pixel before timm's. Once saved and loaded, it resizes with torchvision
    instead of PIL. On photographs this changes values of 0 to 255 by at most 1 (bilinear), or mostly by 1 or 2 and
    rarely by up to 8 (bicubic); `AutoImageProcessor.from_pretrained(…, backend="pil")` loads it with PIL again.

    Args:
        source (`TimmWrapperImageProcessor` or `dict`): what `AutoImageProcessor.from_pretrained("timm/…")` gives, or
            the data configuration of a timm model, from `timm.data.resolve_model_data_config(model)`.

    Raises:
        ValueError: no image processor of transformers does this transform; the message says what to change.
    """
    config = dict(source.data_config if isinstance(source, TimmWrapperImageProcessor) else source)
    if config.keys() != _KEYS:
        differing = ", ".join(f"`{key}`" for key in sorted(config.keys() ^ _KEYS))
        raise ValueError(
            f"the data configuration must have the entries {', '.join(sorted(_KEYS))} and no others; see {differing}. "
            "`timm.data.resolve_data_config(…)` makes a complete one."
        )
    num_channels, height, width = config["input_size"]
    if num_channels not in (1, 3):
        raise ValueError(f"`input_size` = {config['input_size']} has {num_channels} channels, allowed are 1 and 3.")
    for name in ("mean", "std"):
        if len(config[name]) != num_channels:
            raise ValueError(
                f"`{name}` = {config[name]} has {len(config[name])} value(s) for {num_channels} channel(s) in "
                f"`input_size` = {config['input_size']}; give one per channel."
            )
    if config["interpolation"] not in _INTERPOLATIONS:
        raise ValueError(
            f"`interpolation` = {config['interpolation']!r} is not done in the same way by timm and by transformers; "
            "prepare the images with 'bilinear' or 'bicubic'."
        )
    scaled = {side: math.floor(size / config["crop_pct"]) for side, size in (("height", height), ("width", width))}
    if config["crop_mode"] == "center" and height == width:
        size = {"shortest_edge": scaled["height"]}
    elif config["crop_mode"] == "squash":
        size = scaled
    else:
        raise ValueError(
            f"`crop_mode` = {config['crop_mode']!r} with an `input_size` of {height} x {width} is done by no image "
            "processor of transformers; prepare the images with 'squash', or with 'center' if they are square."
        )
    return BitImageProcessorPil(
        size=size,
        crop_size={"height": height, "width": width},
        resample=_INTERPOLATIONS[config["interpolation"]],
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
        do_convert_rgb=num_channels == 3,
    )


def processed_shape(settings: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """
    Channels, height and width of the images that an image processor with these settings makes, the content of
    `preprocessor_config.json`. `None` where they are not set, or depend on the image.
    """
    size = settings.get("crop_size" if settings.get("do_center_crop") else "size")
    if not isinstance(size, Mapping) or not (settings.get("do_center_crop") or settings.get("do_resize")):
        size = {}
    mean = settings.get("image_mean")
    num_channels = 3 if settings.get("do_convert_rgb") else None
    if settings.get("do_normalize") and isinstance(mean, Sequence):
        num_channels = len(mean)
    return num_channels, size.get("height"), size.get("width")


def configured_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images in the configuration of a model that takes `pixel_values`."""
    config: Any = model.config
    timm_model: Any = getattr(model, "timm_model", None)
    if timm_model is not None:
        channels, *size = timm_model.pretrained_cfg["input_size"]
        channels = (config.model_args or {}).get("in_chans", channels)
        size = (config.model_args or {}).get("img_size", size)
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def warn_of_unfitting_processor(processing_class: Any, backbone: PreTrainedModel, auto_class: Any) -> None:
    """
    Logs a warning if an image processor makes images that `backbone` refuses, in contrast to those of the size in its
    configuration. Nothing is computed: a copy that `auto_class` builds is asked on torch's meta device.
    """
    processor = getattr(processing_class, "image_processor", processing_class)
    if not isinstance(processor, BaseImageProcessor) or backbone.main_input_name != "pixel_values":
        return
    own = configured_shape(backbone)
    made = tuple(size or other for size, other in zip(processed_shape(processor.to_dict()), own, strict=True))
    if made == own:
        return
    with torch.device("meta"):
        copied = auto_class.from_config(copy.deepcopy(backbone.config)).eval()
    if _takes(copied, own) and not _takes(copied, made):
        logger.warning(
            f"the processor makes images of {' x '.join(map(str, made))} (channels, height, width), which the "
            f"backbone refuses: its configuration says {' x '.join(map(str, own))}. Change the processor, or make the "
            "backbone for such images, as by `in_chans=1` or `img_size=32` of timm, `num_channels=1` or "
            "`image_size=32` of transformers."
        )


@torch.no_grad()
def _takes(model: PreTrainedModel, shape: tuple[int, ...]) -> bool:
    try:
        model(pixel_values=torch.empty(2, *shape, device="meta"))
    except Exception:  # whatever that model's code raises
        return False
    return True
