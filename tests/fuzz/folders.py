"""Whole folders of every kind, so small that one is read in milliseconds, for mutations to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, GPT2Config

from hf_rtl import (
    ByCentres,
    ByColumn,
    ByGroups,
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    save_rule,
)
from hf_rtl.model_card import write_card
from hf_rtl.modeling.routers import CentroidRouter
from tests.fixtures import _fill_masks
from tests.fuzz.mutations import NUM_FOLDERS, PLANTED
from tests.modeling.random_routers import randomised
from tests.training.small_runs import SMALL_NET, make_labels_trainer


ROUTES = ["day", "night"]
PLANTED_CODE = "raise SystemExit('a file of a stranger was executed')\n"


def image_model() -> RTLModel:
    """Running statistics of every route, and a router with tensors of its own."""
    model = RTLModelForImageClassification.from_backbone(
        SMALL_NET, route_names=ROUTES, ticket_task="labels", num_labels=3, seed=0
    )
    _fill_masks(model, keep=0.3)
    model.set_router(randomised(CentroidRouter(len(ROUTES), 12)), threshold=0.1, fallback="night")
    return model


def text_model() -> RTLModel:
    """Membership tickets with private parameters and thresholds."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=1,
        problem_type="multi_label_classification",
    )
    model = RTLModelForSequenceClassification.from_backbone(
        config, route_names=ROUTES, ticket_task="membership", private_parameters=["*LayerNorm*"], seed=0
    )
    _fill_masks(model)
    model.config.thresholds = [0.25, -0.5]
    return model


def language_model() -> RTLModel:
    """A model that generates, and so has another file of settings."""
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=1)
    model = RTLModelForCausalLM.from_backbone(config, route_names=ROUTES, ticket_task="labels", seed=0)
    _fill_masks(model)
    return model


MODELS = (image_model, text_model, language_model)


def write_models(folder: Path) -> None:
    image_model().save_pretrained(folder / "0", compact=True)
    text_model().save_pretrained(folder / "1", max_shard_size="10KB")
    language_model().save_pretrained(folder / "2")


def write_tickets(folder: Path) -> None:
    """Tickets with all that ticket files can have, beside the models that they are of."""
    for number, make_model in enumerate(MODELS):
        model = make_model()
        model.save_pretrained(folder / str(number) / "outside" / "base")
        if number == 2:  # whole units: one number for each dimension
            mask = [torch.ones(shape, dtype=torch.bool) for shape in model.mask_bank.shapes]
            mask[0][:, 1] = False
            model.mask_bank["day"] = mask
        base_routes = ["night"] if number == 0 else None
        model.save_tickets(folder / str(number), base_routes=base_routes)


def write_rules(folder: Path) -> None:
    rules = (
        ByColumn("domain", ROUTES),
        ByGroups("label", {"day": ["sun", "1"], "night": ["moon"]}),
        ByCentres(torch.arange(6, dtype=torch.float64).view(2, 3), ROUTES),
    )
    for number, rule in enumerate(rules):
        (folder / str(number)).mkdir(parents=True)
        save_rule(folder / str(number), rule)


def write_runs(folder: Path) -> None:
    """A run of one round; a run that has masks alone; one whose round is not evaluated yet."""
    run = folder / "0" / "run"
    make_labels_trainer(run, save_strategy="steps", save_steps=1, max_steps=2, num_train_epochs=1).train()
    shutil.rmtree(run / "final")
    for path in [*run.rglob("*.png"), *run.rglob("*.md")]:
        path.unlink()
    shutil.copytree(run, folder / "1" / "run", ignore=shutil.ignore_patterns("round-*"))
    shutil.copytree(run, folder / "2" / "run", ignore=shutil.ignore_patterns("checkpoint-*", "event-*"))
    (report,) = (folder / "2" / "run").glob("*/round.json")
    report.rename(report.with_name("retrained.json"))


def write_cards(folder: Path) -> None:
    """A card of ours, one with results and words of others, and one without a part of ours."""
    model = image_model()
    for number in range(NUM_FOLDERS):
        (folder / str(number)).mkdir(parents=True)
    write_card(model, folder / "0", license="mit", tags=["traffic"])
    card = (folder / "0" / "README.md").read_text()
    result = "{task: {type: x}, dataset: {name: y, type: y}, metrics: []}"
    results = f"model-index:\n- name: mine\n  results:\n  - {result}\n"
    (folder / "1" / "README.md").write_text(card.replace("---\n", f"---\n{results}", 1) + "\n# My words\n")
    (folder / "2" / "README.md").write_text("---\nlicense: mit\ntags:\n- a\n- b\n---\n# My model\n\nText.\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "config": write_models,
    "weights": write_models,
    "tickets": write_tickets,
    "rules": write_rules,
    "run": write_runs,
    "card": write_cards,
}
# The files that mutations of a kind change.
CHANGED = {"config": "*.json", "weights": "*.safetensors*", "tickets": "*", "rules": "*", "run": "*", "card": "*"}


def write_folders(folder: Path) -> None:
    """Writes `KIND/NUMBER` for every kind, each with code that nothing may run."""
    for kind, write in WRITERS.items():
        write(folder / kind)
        for number in range(NUM_FOLDERS):
            planted = folder / kind / str(number)
            for name in (PLANTED, "modeling_rtl", "configuration_rtl"):
                (planted / f"{name}.py").write_text(PLANTED_CODE)
