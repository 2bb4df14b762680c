"""What grows with the number of routes, of weights and of samples: time, bytes on disk, and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from hf_rtl import MaskBank, MaskedAdamW, RTLModel

from .cases import Case, extract_all, fill_with_random_bits, with_random_masks
from .child import forget_peak, in_child, memory, peak_memory
from .serving import answers
from .timing import alone, compare, in_turn, timed
from .training import extraction_step


NUMS_OF_ROUTES = (2, 10, 100)
# Its similarity is left to `--full`.
MANY_ROUTES = 1000
# Prunable weights of BERT -> its width and depth.
SIZES = {"10^5": (64, 2), "10^6": (128, 5), "10^7": (384, 6), "10^8": (1024, 8)}
BATCHES = (1, 8, 64)
BATCH_CASES = (("ghostnet_rtl, 32 px", "ghostnet_rtl", (3, 32, 32)),)

# Layers of a bank, and weights of a layer.
SIMILARITY = {"num_masks": 100, "num_layers": 25, "layer": 10**6}
AIM_SECONDS, AIM_BYTES = 10.0, 10**9
MEMORY_SIZE, MEMORY_ROUTES, MEMORY_STEPS = (1024, 8), 10, 3
MIB = 2**20


def measure(turns: int, full: bool = False) -> dict[str, Any]:
    """The tables `figures`, `growth` and `memory`."""
    numbers = (*NUMS_OF_ROUTES, MANY_ROUTES)
    lines = [
        grown("ResNet-18, 64 px", num_routes=number, similarity=full or number < MANY_ROUTES) for number in numbers
    ]
    lines += [grown(f"BERT of {name} weights", num_routes=10, size=size) for name, size in SIZES.items()]
    found = in_child(similarity, **SIMILARITY)
    name = (
        f"similarity of {SIMILARITY['num_masks']} masks of {SIMILARITY['num_layers'] * SIMILARITY['layer']:,} weights"
    )
    figures = [
        alone(name, found["seconds"], "s", aim=AIM_SECONDS),
        alone(f"{name}, memory beyond the bank", found["bytes"] / MIB, "MiB", aim=AIM_BYTES / MIB),
        *(line for case in BATCH_CASES for line in batches(*case, turns)),
    ]
    memories = [in_child(retraining_memory, size=MEMORY_SIZE), in_child(extraction_memory, size=MEMORY_SIZE)]
    return {"figures": figures, "growth": lines, "memory": memories}


def batches(name: str, backbone: str, shape: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """One route against its extracted ticket, for batches of several sizes."""
    lines = []
    for number in BATCHES:
        case = Case(name, backbone, (number, *shape))
        model = with_random_masks(case.model(2)).eval()
        ticket, inputs = extract_all(model)[0], case.inputs()
        times = in_turn(
            {
                "route": answers(lambda m=model, x=inputs: m(**x, route_ids=0)),
                "ticket": answers(lambda m=ticket, x=inputs: m(**x)),
            },
            turns,
        )
        lines.append(
            compare(f"one route, batch of {number}: {name}", times["route"], "extracted ticket", times["ticket"])
        )
    return lines


def grown(
    name: str, *, num_routes: int, similarity: bool = True, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The line of a model: saved by this process, and measured in another."""
    with tempfile.TemporaryDirectory() as folder:
        model = growing_case(size).model(num_routes)
        fill_with_random_bits(model.mask_bank)
        model.save_pretrained(folder)
        del model
        found = in_child(load, folder=folder, similarity=similarity, size=size)
        num_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"model": name, "routes": num_routes, "on disk (MiB)": num_bytes / MIB, **found}


def growing_case(size: tuple[int, int] | None) -> Case:
    """ResNet-18, or BERT of (width, depth)."""
    if size is None:
        return Case("ResNet-18", "resnet18", (1, 3, 64, 64))
    return Case("BERT", bert(*size), (1, 16))


def bert(width: int, depth: int) -> BertConfig:
    heads = width // 64
    return BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=1000,
    )


def load(folder: str, similarity: bool, size: tuple[int, int] | None) -> dict[str, Any]:
    """Seconds by the processor's clock of what a user waits for, and the peak of memory."""
    case = growing_case(size)
    models: list[RTLModel] = []
    cls = type(case.model(2))
    before = memory()
    forget_peak()
    found = {"load (s)": _seconds(lambda: models.append(cls.from_pretrained(folder).eval()))}
    (model,), inputs = models, case.inputs()
    found["first answer (s)"] = _seconds(answers(lambda: model(**inputs, route_ids=0)))
    found["next route (s)"] = _seconds(answers(lambda: model(**inputs, route_ids=1)))
    found["same route again (s)"] = _seconds(answers(lambda: model(**inputs, route_ids=1)))
    found["peak (MiB)"] = (peak_memory() - before) / MIB
    bank = sum(rows.nbytes for rows in model.mask_bank.packed)
    held = bank + sum(tensor.nbytes for tensor in model.backbone.state_dict().values())
    found["weights and packed bank (MiB)"] = held / MIB
    if similarity:
        forget_peak()
        before = memory()
        found["similarity (s)"] = _seconds(model.mask_bank.similarity)
        found["similarity, beyond (MiB)"] = (peak_memory() - before) / MIB
    return found


def similarity(num_masks: int, num_layers: int, layer: int) -> dict[str, Any]:
    """Seconds by the processor's clock, and bytes beyond those of the packed bank, of all similarities of a bank."""
    weights = [(f"weight {index}", (layer,)) for index in range(num_layers)]
    bank = MaskBank(weights, [f"route {k}" for k in range(num_masks)])
    fill_with_random_bits(bank)
    forget_peak()
    before = memory()
    return {"seconds": _seconds(bank.similarity), "bytes": peak_memory() - before}


def retraining_memory(size: tuple[int, int]) -> dict[str, Any]:
    """The peak of joint retraining, and what it has to hold."""
    case = growing_case(size)
    before = memory()
    forget_peak()
    model = case.model(MEMORY_ROUTES)
    fill_with_random_bits(model.mask_bank)
    optimizer = MaskedAdamW(model.train().parameters(), model, lr=1e-4)
    labels = torch.zeros(case.shape[0], dtype=torch.int64)
    for step in range(MEMORY_STEPS):
        optimizer.zero_grad()
        model(**case.inputs(), labels=labels, route_ids=step % MEMORY_ROUTES).loss.backward()
        optimizer.step()
    parts = {
        "weights": _bytes(model.parameters()),
        "gradients": _bytes(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
        "optimizer": _bytes(value for state in optimizer.state.values() for value in state.values()),
        "masked copy": _bytes(model.masker.weights),
        "unpacked masks in the cache": model.masker.cached_bytes(),
        "packed bank": _bytes(model.mask_bank.packed),
    }
    return _memory_line("joint retraining", parts, peak_memory() - before)


def extraction_memory(size: tuple[int, int]) -> dict[str, Any]:
    """The peak of the extraction of one route, and what it has to hold."""
    case = growing_case(size)
    before = memory()
    forget_peak()
    model = case.model(MEMORY_ROUTES)
    fill_with_random_bits(model.mask_bank)
    step = extraction_step(model, {**case.inputs(), "labels": torch.zeros(case.shape[0], dtype=torch.int64)})
    for _ in range(MEMORY_STEPS):
        step()
    weights = _bytes(model.parameters())
    parts = {
        "weights": weights,
        "weights to rewind to": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "integers of the masks": _bytes(model.masker.weights),
        "packed bank": _bytes(model.mask_bank.packed),
    }
    return _memory_line("extraction of a route", parts, peak_memory() - before)


def _memory_line(what: str, parts: dict[str, int], peak: int) -> dict[str, Any]:
    held = sum(parts.values())
    words = ", ".join(f"{name} {number / MIB:,.0f}" for name, number in parts.items())
    return {
        "what": what,
        "holds (MiB)": words,
        "sum (MiB)": held / MIB,
        "peak (MiB)": peak / MIB,
        "ratio": peak / held,
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _seconds(step: Callable[[], object]) -> float:
    return timed(step)[0]
