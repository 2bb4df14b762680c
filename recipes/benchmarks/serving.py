"""Answers of one route, of routes in turn, of mixed batches and small tickets, against extracted tickets; and LoRA."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch

from hf_rtl import RTLModel

from .cases import BERT, VIT, Case, extract_all, with_random_masks, without_half_of_units
from .timing import compare, difference, in_turn


ONE_SAMPLE = (
    Case("ResNet-18, 224 px", "resnet18", (1, 3, 224, 224)),
    Case("ResNet-18, 64 px", "resnet18", (1, 3, 64, 64)),
    Case("BERT 6 x 384, 16 tokens", BERT, (1, 16)),
    Case("ghostnet_rtl, 32 px", "ghostnet_rtl", (1, 3, 32, 32)),
)
MIXED = (
    Case("ghostnet_rtl, 320 images of 32 px", "ghostnet_rtl", (320, 3, 32, 32)),
    Case("BERT 6 x 384, 64 texts of 64 tokens", BERT, (64, 64)),
)
WITHOUT_UNITS = (
    Case("BERT 6 x 384, 32 texts of 64 tokens", BERT, (32, 64)),
    Case("ViT 6 x 384, 32 images of 64 px", VIT, (32, 3, 64, 64)),
)
IN_TURN, IN_BATCH = 4, 10
# Bytes within which ten tickets of the networks above are kept.
ENOUGH_BYTES = 2**30

# Groups of one adapter or route each; texts of so many tokens; the rank of LoRA and where it is.
NUM_GROUPS, TOKENS, GROUP_SIZES = 4, 32, (1, 2, 4, 8, 16, 32)
GROUPS = Case("BERT 6 x 384", BERT, (NUM_GROUPS, TOKENS))
RANK, ADAPTED = 8, ["query", "value"]

AIM_ONE, AIM_IN_TURN, AIM_MIXED, AIM_HALF, AIM_SMALL = 1.05, 1.08, 1.08, 0.7, 1.05


def measure(turns: int) -> dict[str, Any]:
    """The tables `figures` and `adapters`, and `break_even`, a sentence."""
    lines = [line for case in ONE_SAMPLE for line in one_sample(case, turns)]
    lines += [line for case in MIXED for line in mixed_batch(case, turns)]
    lines += [line for case in WITHOUT_UNITS for line in small_ticket(case, turns)]
    return {"figures": lines, **adapters(turns)}


def one_sample(case: Case, turns: int) -> list[dict[str, Any]]:
    """
    One fixed route against its extracted ticket, some in turn against theirs, and what finding a kept ticket takes.
    """
    model = with_random_masks(case.model(IN_TURN)).eval()
    tickets, inputs = extract_all(model), case.inputs()
    times = in_turn(
        {
            "route": answers(lambda: model(**inputs, route_ids=0)),
            "ticket": answers(lambda: tickets[0](**inputs)),
            "routes": answers(lambda: [model(**inputs, route_ids=route) for route in range(IN_TURN)]),
            "tickets": answers(lambda: [ticket(**inputs) for ticket in tickets]),
            # Between answers, since the processor's caches are full of those.
            "found ticket": answers(lambda: (find(model, 0), tickets[0](**inputs))),
        },
        turns,
    )
    one = compare(f"one route: {case.name}", times["route"], "extracted ticket", times["ticket"], aim=AIM_ONE)
    name = f"{IN_TURN} routes in turn: {case.name}"
    return [
        one,
        compare(
            f"finding the ticket that is kept: {case.name}",
            difference(times["found ticket"], times["ticket"]),
            "its answer",
            times["ticket"],
        ),
        compare(name, times["routes"], "extracted tickets", times["tickets"], aim=AIM_IN_TURN),
    ]


def find(model: RTLModel, route: int) -> None:
    """What a call does before and after a kept ticket answers: it compares what the ticket was made of."""
    ticket = model.tickets.get(model, route)
    assert ticket is not None  # nothing is offloaded
    with ticket.in_place():
        pass


def mixed_batch(case: Case, turns: int) -> list[dict[str, Any]]:
    """A batch of many routes, sorted by route and shuffled, against a call of each extracted ticket on its samples."""
    model = with_random_masks(case.model(IN_BATCH)).eval()
    tickets, inputs, lines = extract_all(model), case.inputs(), []
    in_order = torch.arange(case.shape[0]) * IN_BATCH // case.shape[0]
    shuffled = in_order[torch.randperm(case.shape[0], generator=torch.Generator().manual_seed(0))]
    for order, routes, limit in (
        ("sorted, cache of the default size", in_order, model.config.mask_cache_bytes),
        ("sorted", in_order, ENOUGH_BYTES),
        ("shuffled", shuffled, ENOUGH_BYTES),
    ):
        model.config.mask_cache_bytes = limit
        ids = routes.tolist()
        parts = [{name: value[routes == k] for name, value in inputs.items()} for k in range(IN_BATCH)]
        times = in_turn(
            {
                "mixed": answers(lambda ids=ids: model(**inputs, route_ids=ids)),
                "tickets": answers(
                    lambda parts=parts: [ticket(**part) for ticket, part in zip(tickets, parts, strict=True)]
                ),
            },
            turns,
        )
        name = f"{IN_BATCH} routes in a batch, {order}: {case.name}"
        lines.append(compare(name, times["mixed"], "extracted tickets", times["tickets"], aim=AIM_MIXED))
    return lines


def small_ticket(case: Case, turns: int) -> list[dict[str, Any]]:
    """A ticket without half of its units, computed with small matrices, against the dense network and its own."""
    inputs = case.inputs()
    model = without_half_of_units(case.model(2), inputs).eval()
    dense, small = copy.deepcopy(model.backbone).eval(), model.extract_ticket(0, small=True).eval()
    model.config.compute = "small"
    times = in_turn(
        {
            "route": answers(lambda: model(**inputs, route_ids=0)),
            "dense": answers(lambda: dense(**inputs)),
            "small": answers(lambda: small(**inputs)),
        },
        turns,
    )
    name = f"without half of the units: {case.name}"
    return [
        compare(name, times["route"], "dense network", times["dense"], aim=AIM_HALF),
        compare(name, times["route"], "small extracted ticket", times["small"], aim=AIM_SMALL),
    ]


def adapters(turns: int) -> dict[str, Any]:
    """Batches of groups of several sizes, through routes and through LoRA adapters, against the plain network."""
    if importlib.util.find_spec("peft") is None:
        return {"adapters": [], "break_even": 'PEFT is not installed (`pip install "hf_rtl[bench]"`): not measured.'}
    model = with_random_masks(GROUPS.model(NUM_GROUPS)).eval()
    plain = copy.deepcopy(model.backbone).eval()
    lora = with_adapters(copy.deepcopy(model.backbone))
    lines = []
    for size in GROUP_SIZES:
        ids = [k for k in range(NUM_GROUPS) for _ in range(size)]
        inputs = {name: value.repeat_interleave(size, dim=0) for name, value in GROUPS.inputs().items()}
        names = [f"adapter {k}" for k in ids]
        times = in_turn(
            {
                "routes": answers(lambda x=inputs, ids=ids: model(**x, route_ids=ids)),
                "adapters": answers(lambda x=inputs, names=names: lora(**x, adapter_names=names)),
                "plain": answers(lambda x=inputs: plain(**x)),
            },
            turns,
            seconds=15,
        )
        against_plain = {
            kind: compare("", times[kind], "", times["plain"])["ratio"] for kind in ("routes", "adapters")
        }
        lines.append(
            {
                "samples in a group": size,
                "plain network (ms)": 1e3 * statistics.median(times["plain"].process),
                **{f"{kind} / plain": found for kind, found in against_plain.items()},
                **{
                    f"routes / adapters{suffix}": line[title]
                    for line in [compare("", times["routes"], "", times["adapters"])]
                    for suffix, title in (("", "ratio"), (", quartiles", "quartiles"))
                },
            }
        )
    return {"adapters": lines, "break_even": break_even(lines)}


def with_adapters(network: torch.nn.Module) -> torch.nn.Module:
    """The network with an adapter for each group, none of which is zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=ADAPTED, init_lora_weights=False)
    lora = get_peft_model(network, config, adapter_name="adapter 0")
    for k in range(1, NUM_GROUPS):
        lora.add_adapter(f"adapter {k}", config)
    return lora.eval()


def break_even(lines: list[dict[str, Any]]) -> str:
    """From which group size on routes cost no more than adapters."""
    sizes = [line["samples in a group"] for line in lines]
    dear = [line["samples in a group"] for line in lines if line["routes / adapters"] > 1]
    if not dear:
        return f"Routes cost no more than adapters at every size measured, from {sizes[0]} on."
    after = [size for size in sizes if size > dear[-1]]
    if not after:
        return f"Routes cost more than adapters up to the largest size measured, {sizes[-1]}."
    return f"Routes cost no more than adapters from groups of {after[0]} samples on."


def answers(call: Callable[[], object]) -> Callable[[], None]:
    def answer() -> None:
        with torch.inference_mode():
            call()

    return answer
