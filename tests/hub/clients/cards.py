"""Cards that are pushed, and edited on the Hub or on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import ViTConfig, ViTForImageClassification

from hf_rtl import RTLModelForImageClassification, RTLTrainer
from tests.hub.clients.models import ROUTES
from tests.hub.clients.runs import SHORT, make_trainer


FINAL_CARD = Path("run/final/README.md")


def read_and_validate(name: str, **options: Any) -> dict[str, Any]:
    """The card in a repository, as the client reads it. The Hub validates its metadata."""
    card = ModelCard(Path(hf_hub_download(name, "README.md", **options)).read_text())
    card.validate()
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return {**card.data.to_dict(), "text": card.text}


def edit_card(name: str, old: str, new: str, **options: Any) -> None:
    """Edits a card as people do on the page of a model."""
    content = Path(hf_hub_download(name, "README.md", **options)).read_text()
    assert old in content
    HfApi().upload_file(
        path_or_fileobj=content.replace(old, new).encode(), path_in_repo="README.md", repo_id=name, **options
    )


def create_with_card(name: str, content: str) -> None:
    """Creates a repository with a card as people do on the page for new models."""
    api = HfApi()
    api.create_repo(name)
    api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id=name)


def train_pushed(name: str) -> RTLTrainer:
    trainer = make_trainer(hub_model_id=name, **SHORT)
    trainer.train()
    trainer.push_to_hub(license="mit")
    return trainer


def push_again_after_an_edit_there(name: str) -> None:
    trainer = train_pushed(name)
    for old, new in ((b"license: mit", b"license: apache-2.0"), (b"hf_rtl: end -->", b"hf_rtl: end -->\nOne.\n")):
        edit_card(name, old.decode(), new.decode())
        trainer.push_to_hub()
    # The last push has brought "One." to this machine.
    edit_card(name, "One.", "Two.")
    trainer.push_to_hub(commit_message="Last")


def push_again_after_an_edit_here(name: str) -> None:
    trainer = train_pushed(name)
    for line in ("One.\n", "Two.\n"):
        FINAL_CARD.write_text(FINAL_CARD.read_text() + line)
        trainer.push_to_hub()


def push_again_after_edits_on_both_sides(name: str) -> tuple[str, bool]:
    """The error of the push, and whether the local card is unchanged."""
    trainer = train_pushed(name)
    edit_card(name, "license: mit", "license: apache-2.0")
    mine = FINAL_CARD.read_text() + "Mine.\n"
    FINAL_CARD.write_text(mine)
    try:
        trainer.push_to_hub()
    except ValueError as error:
        return str(error), FINAL_CARD.read_text() == mine
    return "", False


def push_again_after_a_refused_push(name: str) -> None:
    """Pushes a local text, which is refused, and again without the condition that refused it."""
    trainer = train_pushed(name)
    FINAL_CARD.write_text(FINAL_CARD.read_text() + "Mine.\n")
    try:
        trainer.push_to_hub(parent_commit="0" * 40)
    except Exception:
        trainer.push_to_hub()


def push_trained_model(name: str) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.model.push_to_hub(name, tags=["mine"])


def train_from_hub(backbone: str, name: str) -> None:
    """Pushes a plain network, then trains and pushes tickets that start from it, and from folders with its weights."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=8,
        num_labels=1,
        problem_type="multi_label_classification",
    )
    plain = ViTForImageClassification(config)
    plain.push_to_hub(backbone)
    plain.save_pretrained("secret/backbone")
    for source, target in (
        (backbone, f"{name}-repo"),
        ("secret/backbone", f"{name}-folder"),
        (backbone, f"{name}-both"),
    ):
        if target.endswith("-both"):  # a folder with the name of the repository
            plain.save_pretrained(backbone)
        model = RTLModelForImageClassification.from_backbone(source, route_names=ROUTES, ticket_task="membership")
        made = make_trainer(hub_model_id=target, output_dir=str(Path(target).absolute()), **SHORT)
        trainer = RTLTrainer(model, made.args, train_dataset=made.train_dataset)
        trainer.train()
        trainer.push_to_hub()
