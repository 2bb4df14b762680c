"""
What reads the files of a kind, as users do, and what must be true of what was read.

A reader returns what came: `"loaded"`; `"refused"`, where a function promises `None` for damaged files; or `"answers
not"`, where a model was loaded whose configuration lets the library's own backbone fail in a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_rtl import ByCentres, ByColumn, ByGroups, MaskBank, RTLModel, load_rule
from hf_rtl.model_card import write_card
from hf_rtl.model_card.readme import Readme
from hf_rtl.modeling.ticket_files import read_index
from hf_rtl.training.run_directory import RunDirectory, last_usable_checkpoint
from tests.fuzz import folders
from tests.fuzz.oracle import Broken


INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "pixel_values": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)},
    "input_ids": {"input_ids": torch.arange(8).view(2, 4)},
}


def answer(model: RTLModel) -> str:
    """Asks every ticket, and their union."""
    inputs = INPUTS.get(model.main_input_name, INPUTS["input_ids"])
    try:
        with torch.no_grad():
            answers = [model(**inputs, route_ids=route).logits for route in (-1, *range(model.num_routes))]
    except Exception as error:
        frames, depth = error.__traceback__, 0
        while frames is not None:  # the backbone's own code fails, not that around it
            inside, frames = frames.tb_frame.f_code.co_filename, frames.tb_next
            depth += 1
        if "/hf_rtl/" in inside and not isinstance(error, ValueError):
            raise
        return "answers not"
    if any(len(logits) != 2 for logits in answers):
        raise Broken(f"answers have the shapes {[tuple(logits.shape) for logits in answers]} for two samples")
    return "loaded"


def read_model(folder: Path) -> str:
    model = RTLModel.from_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    if model.mask_bank.fingerprint() != saved["mask_fingerprint"]:
        raise Broken("the masks are not those of their hash")
    if model.num_routes != len(saved["route_names"]) or model.config.route_names != model.route_names:
        raise Broken("the routes are not those of the configuration")
    return answer(model)


def read_tickets(folder: Path) -> str:
    model = RTLModel.from_pretrained(folder / "outside" / "base")
    weights = [weight.clone() for weight in model.masker.weights]
    before = (model.mask_bank.fingerprint(), list(model.route_names), model.config.to_json_string())
    try:
        names = model.load_tickets(folder, rename="auto")
    except Exception:
        now = (model.mask_bank.fingerprint(), list(model.route_names), model.config.to_json_string())
        if now != before or not all(map(torch.equal, weights, model.masker.weights)):
            raise Broken("the model has changed, although the tickets are refused") from None
        raise
    entries = read_index(folder)["tickets"]
    kept = model.mask_bank.count().tolist()[-len(names) :] if names else []
    if kept != [entry["kept"] for entry in entries]:
        raise Broken("a ticket keeps another number of weights than its file says")
    return answer(model)


def read_rule(folder: Path) -> str:
    rule = load_rule(folder)
    if isinstance(rule, ByCentres):
        partition = rule.assign(torch.zeros(2, rule.centres.shape[1]))
    elif isinstance(rule, ByGroups):
        partition = rule.assign_labels([group[0] for group in rule.groups.values()])
    else:
        assert isinstance(rule, ByColumn)
        partition = rule.assign([{rule.column: name} for name in rule.route_names])
    if partition.route_names != rule.route_names or not rule.describe():
        raise Broken("the partition has other routes than the rule")
    return "loaded"


def read_run(folder: Path) -> str:
    """What a trainer reads of the directory of a run before it continues the run."""
    whole = json.loads((_SEEDS[0] / "run" / folder.name / "run" / "run.json").read_text())
    extraction = json.loads((_SEEDS[0] / "run" / folder.name / "run" / "extraction" / "extraction.json").read_text())
    bank = MaskBank(whole["configuration"]["prunable"], whole["configuration"]["model"]["route_names"])
    directory = RunDirectory(folder / "run")
    directory.open(whole["configuration"], extraction["configuration"], whole["surroundings"])
    found = []
    for file in sorted((_SEEDS[0] / "run" / folder.name / "run" / "extraction").glob("event-*/*.safetensors")):
        event, route = int(file.parent.name[-3:]), int(file.stem[-3:])
        packed = directory.load_mask(event, route, bank)
        if packed is not None:
            bank.set_packed(route, packed)
            bank.validate()
        found.append(packed is not None)
    for round_ in sorted((folder / "run").glob("round-*")):
        report = directory.read_report(round_)
        found.append(report is not None)
        if report is not None:
            _ = report["mask_fingerprint"][:16], report["steps"] + 1, report["log_history"] + [], report["thresholds"]
        if list(round_.glob("checkpoint-*")):
            found.append(last_usable_checkpoint(round_, world_size=1) is not None)
    return "loaded" if all(found) else "refused"


def read_card(folder: Path) -> str:
    """A card is written anew around what it holds, and then again."""
    file = folder / "README.md"
    before = Readme.parse(file.read_bytes())
    write_card(_card_model(), folder)
    once = file.read_bytes()
    write_card(_card_model(), folder)
    if file.read_bytes() != once:
        raise Broken("a card changes when it is written again")
    after = Readme.parse(once)
    if (after.before.strip(), after.after.strip()) != (before.before.strip(), before.after.strip()):
        raise Broken("text of others in a card changes")
    return "loaded"


READERS: dict[str, Callable[[Path], str]] = {
    "config": read_model,
    "weights": read_model,
    "tickets": read_tickets,
    "rules": read_rule,
    "run": read_run,
    "card": read_card,
}
WRITING = ("run", "card")  # their readers write into the folder

_SEEDS: list[Path] = []
_MODELS: list[RTLModel] = []


def start(seeds: Path) -> None:
    """Tells the readers where the undamaged folders are."""
    _SEEDS[:], _MODELS[:] = [seeds], []


def _card_model() -> RTLModel:
    if not _MODELS:
        _MODELS.append(folders.image_model())
    return _MODELS[0]


def words(folder: Path) -> set[str]:
    """
    Names of keys and tensors in the undamaged files of a folder, except those that are English words, which may be in
    any error.
    """
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            found.update(value)
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    for file in folder.rglob("*.json"):
        collect(json.loads(file.read_text()))
    return {word for word in found if not word.isalpha()}
