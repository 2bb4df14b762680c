"""
Writes small files of every kind that hf_rtl writes. Later versions must read them:

    python tests/earlier_files/write.py tests/earlier_files/DATE

The files of a date are never written again. `tests/test_earlier_files.py` reads them with the models, data and
arguments of this module.
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from transformers import TrainerCallback, ViTConfig

from hf_rtl import ByColumn, RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments, save_rule


ROUTES = ["ant", "bee", "cat"]
MASKED_BY = {"ant": 2, "bee": 3, "cat": 5}  # A ticket prunes every weight whose position is a multiple of this.


class Net(nn.Module):
    """Two convolutions with batch norm, and a head."""

    def __init__(self, *, num_classes=1, in_chans=3):
        super().__init__()
        self.num_classes = num_classes
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.fc(x.mean((2, 3)))


default_cfgs = generate_default_cfgs({"earlier_files_net.untrained": {"num_classes": 1, "classifier": "fc"}})


@register_model
def earlier_files_net(pretrained=False, **arguments):
    return build_model_with_cfg(Net, "earlier_files_net", pretrained, **arguments)


def waves(*shape):
    """Numbers that are equal with every version, since no random generator makes them."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.7).sin().float().reshape(shape)


def images():
    return waves(6, 3, 8, 8)


def samples():
    """18 images, brighter in the channel of their route."""
    pixels = waves(18, 3, 8, 8)
    for index in range(len(pixels)):
        pixels[index, index % 3] += 1
    return [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]


@torch.no_grad()
def fill(model):
    """Gives a model weights, masks, statistics and private rows that follow from a formula."""
    for parameter in model.parameters():
        parameter.copy_(waves(*parameter.shape).mul(0.3))
    for name in model.route_names:
        model.mask_bank[name] = [
            (torch.arange(shape.numel()) % MASKED_BY[name] != 0).reshape(shape) for shape in model.mask_bank.shapes
        ]
    for rows in model.norm_statistics.rows:
        rows.copy_(waves(*rows.shape).abs().add(0.5).mul(3))
    return model.eval()


def labels_model():
    """Tickets for labels over a vision transformer, with private norms."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    return RTLModelForImageClassification.from_backbone(
        config, route_names=ROUTES, ticket_task="labels", private_parameters=["*layernorm*"], seed=0
    )


def membership_model():
    """Membership tickets over a network with batch norm."""
    return RTLModelForImageClassification.from_backbone(
        "earlier_files_net", route_names=ROUTES, ticket_task="membership", seed=0
    )


def arguments(folder, **values):
    written = dict(
        target_sparsity=[0.3, 0.6],
        prune_amount=0.3,
        extraction_steps=2,
        num_train_epochs=1,
        route_batch_size=4,
        learning_rate=1e-3,
        calibration_fraction=0.2,
        router="score",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return RTLTrainingArguments(output_dir=str(folder), **{**written, **values})


class StopError(Exception):
    pass


class StopInSecondRound(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if "round-02" in args.output_dir:
            raise StopError


def trainer(folder, model, callbacks=(), **values):
    """A trainer with the arguments of the written run, changed by `values`."""
    args = arguments(folder, **values)
    return RTLTrainer(model, args, train_dataset=samples(), eval_dataset=samples(), callbacks=list(callbacks))


def main(folder):
    model = fill(labels_model())
    model.save_pretrained(folder / "model")
    model.save_tickets(folder / "tickets")
    save_rule(folder / "model", ByColumn("label", ROUTES))
    compact = fill(membership_model())
    compact.config.thresholds = [0.25, -0.5, 0.125]
    compact.save_pretrained(folder / "compact", compact=True)
    answers = {
        f"{kind}.{route}": answering(pixel_values=images(), route_ids=route).logits.detach()
        for kind, answering in (("model", model), ("compact", compact))
        for route in range(-1, 3)
    }
    save_file(answers, folder / "answers.safetensors")
    stopped = trainer(folder / "run", membership_model(), [StopInSecondRound()])
    with contextlib.suppress(StopError):
        stopped.train()
    # The run ends when only one route has its tickets of the second round.
    for file in (folder / "run" / "extraction").glob("event-*/route-*.safetensors"):
        if file.parent.name == max(p.name for p in file.parent.parent.glob("event-*")) and file.name > "route-000.z":
            file.unlink()
    for left in [*(folder / "run").glob("round-02*"), *(folder / "run").glob("**/checkpoint-*")]:
        shutil.rmtree(left)
    assert load_file(folder / "run" / "theta0.safetensors") and not (folder / "run" / "final").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
