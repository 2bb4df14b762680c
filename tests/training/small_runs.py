"""Whole runs on a few images, and the parts of two runs that must be equal."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.training.run_directory import RunDirectory
from hf_rtl.training.ticket_trainer import named_state


ROUTES = ["ant", "bee", "cat"]
DOMAINS = ("pixel_values", "labels", "domain")
ROUNDS = ["round-01-sparsity-0.3", "round-02-sparsity-0.6"]


class Images(Dataset):
    """Noise, brighter in the channel of the route. Every fetch adds noise, as random transforms do."""

    def __init__(self, number, seed=0, columns=("pixel_values", "label"), num_routes=3, size=16, noise=0.0):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(number, 3, size, size, generator=generator)
        self.samples = []
        for index in range(number):
            route = index % num_routes
            pixels[index, route] += 1
            everything = {
                "pixel_values": pixels[index],
                "label": route,
                "domain": route,
                "labels": index // num_routes % 2,
            }
            self.samples.append({name: everything[name] for name in columns})
        self.noise = noise
        self.fetched = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.fetched.append(index)
        if not self.noise:
            return self.samples[index]
        pixels = self.samples[index]["pixel_values"]
        return {**self.samples[index], "pixel_values": pixels + self.noise * torch.randn(pixels.shape)}


class SmallNet(nn.Module):
    """Three convolutions with batch norm, and a head; some thousand weights."""

    def __init__(self, *, num_classes=2, in_chans=3, drop_rate=0.0):
        super().__init__()
        self.num_classes = num_classes
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(12, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(convolution(x)).relu()
        return self.fc(self.drop(x.mean((2, 3))))


SMALL_NET = "small_net_for_tests"
default_cfgs = generate_default_cfgs({"small_net_for_tests.untrained": {"num_classes": 2, "classifier": "fc"}})


@register_model
def small_net_for_tests(pretrained=False, **arguments):
    return build_model_with_cfg(SmallNet, SMALL_NET, pretrained, **arguments)


def image_model(seed=0, routes=ROUTES, ticket_task="membership", drop_rate=0.2, **arguments):
    return RTLModelForImageClassification.from_backbone(
        SMALL_NET,
        route_names=routes,
        ticket_task=ticket_task,
        seed=seed,
        drop_rate=drop_rate,
        **arguments,
    )


def arguments(folder, **values):
    defaults = {
        "target_sparsity": [0.3, 0.6],
        "prune_amount": 0.3,
        "extraction_steps": 2,
        "num_train_epochs": 1,
        "route_batch_size": 8,
        "per_device_eval_batch_size": 12,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RTLTrainingArguments(output_dir=str(folder), **{**defaults, **values})


def make_trainer(folder, model=None, callbacks=(), train=None, evaluate=None, options=None, **values):
    return RTLTrainer(
        image_model() if model is None else model,
        arguments(folder, **values),
        train_dataset=Images(24, noise=0.1) if train is None else train,
        eval_dataset=Images(12, seed=1) if evaluate is None else evaluate,
        callbacks=list(callbacks),
        **(options or {}),
    )


def make_labels_trainer(folder, model=None, train=None, evaluate=None, **values):
    """Tickets for labels; 12 samples to evaluate on, of three routes and two labels."""
    return make_trainer(
        folder,
        image_model(ticket_task="labels", num_labels=2) if model is None else model,
        train=Images(24, columns=DOMAINS) if train is None else train,
        evaluate=Images(12, seed=1, columns=DOMAINS) if evaluate is None else evaluate,
        **{"route_column": "domain", "target_sparsity": [0.3], **values},
    )


def run(folder, *positional, **values):
    made = make_trainer(folder, *positional, **values)
    made.train()
    return made


class Recorder(TrainerCallback):
    """Counts the calls, and keeps the model's state at the start of every joint retraining."""

    def __init__(self):
        self.calls, self.starts, self.logs = Counter(), [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.calls["train_begin"] += 1
        backbone = {name: tensor.detach().clone() for name, tensor in named_state(model.backbone)}
        rows = None if model.norm_statistics is None else [row.clone() for row in model.norm_statistics.rows]
        self.starts.append((backbone, rows))

    def on_step_end(self, args, state, control, **kwargs):
        self.calls["step_end"] += 1

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.calls["evaluate"] += 1

    def on_save(self, args, state, control, **kwargs):
        self.calls["save"] += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.calls["train_end"] += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def masks_on_disk(folder, model):
    """(event, route) -> masks."""
    directory = RunDirectory(folder)
    found = {}
    for file in sorted((Path(folder) / "extraction").glob("event-*/route-*.safetensors")):
        event, route = int(file.parent.name.split("-")[1]), int(file.stem.split("-")[1])
        found[event, route] = model.mask_bank.unpack(directory.load_mask(event, route))
    return found


def contents(folder):
    """The parts of equal runs that must be equal: the tensors of every round and of the final model, θ0, all masks."""
    paths = [*Path(folder).glob("round-*/model.safetensors"), *Path(folder).glob("final/model.safetensors")]
    paths += [*Path(folder).glob("extraction/event-*/*.safetensors"), *Path(folder).glob("theta0.safetensors")]
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:  # the order of its metadata is not that of writing
            found[str(path.relative_to(folder))] = file.metadata(), hash_tensors(load_file(path))
    return found


def files(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(metrics):
    """The metrics that do not depend on the time or on the position in the training."""
    return {key: value for key, value in metrics.items() if not key.endswith(("_second", "time", "round", "epoch"))}


class Broken(Images):
    """`Images` with a change to its samples."""

    def __init__(self, number, change, **values):
        super().__init__(number, **values)
        self.samples = [change(index, sample) for index, sample in enumerate(self.samples)]
