"""Pushes to the Hub: in a single commit, with a card, and with the code of the model if that is asked for."""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from timm.models import model_entrypoint
from transformers import PreTrainedModel, TimmWrapperConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import create_and_tag_model_card


# The page of a repository.
CARD_FILE = "README.md"
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
# What a push replaces: of a model also the rule of the partition that it was trained on.
MODEL_FILES = re.compile(rf"{WEIGHT_FILES.pattern}|partition\.(json|safetensors)")
TICKET_FILES = re.compile(r"ticket-\d+\.safetensors")


def branch_head(repo_id: str, revision: str | None, *, token: bool | str | None) -> str | None:
    """The last commit of a branch, which is made if it is not there."""
    api = HfApi()
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return api.model_info(repo_id, revision=revision, token=token).sha


def read_card(repo_id: str, revision: str | None, *, token: bool | str | None) -> bytes:
    """The model card in a repository; empty if there is none."""
    try:
        return Path(hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)).read_bytes()
    except RemoteEntryNotFoundError:
        return b""


# The module that writes the pages of repositories, `hf_rtl.model_card`: set by `import hf_rtl`. None in code that came
# with a model from the Hub, with which neither that module nor its templates travel.
card_writer: Any = None


def write_model_card(
    model: Any,
    folder: Path,
    *,
    repo_id: str,
    revision: str | None,
    tags: list[str] | None,
    token: bool | str | None,
) -> None:
    """Writes into `folder` the card of a model that is to be pushed; without a writer transformers' stock one."""
    if card_writer is None:
        card = create_and_tag_model_card(repo_id, [*(model.model_tags or []), *(tags or [])], token=token)
        card.save(folder / CARD_FILE)
        return
    remote = read_card(repo_id, revision, token=token)
    card_writer.write_pushed_card(model, folder, repo_id=repo_id, remote=remote, tags=tags, token=token)


def write_tickets_page(folder: Path, index: Mapping[str, Any], content: bytes, *, repo_id: str | None = None) -> None:
    """Writes a `README.md`: `content` with the tickets of `index` in it, unless it is to stay or nothing writes it."""
    page = None if card_writer is None else card_writer.tickets_page(index, content, repo_id=repo_id)
    if page is not None:
        (folder / CARD_FILE).write_bytes(page)


def push(
    write: Callable[[Path, str, str | None], None],
    repo_id: str,
    *,
    private: bool | None,
    token: bool | str | None,
    parent_commit: str | None,
    **arguments: Any,
) -> tuple[str, CommitInfo]:
    """
    Pushes what `write` writes, in a single commit, to a repository that is made if it is not there.

    Args:
        write (`Callable`): is called with a folder that it is to make and fill, the full name of the repository and
            the last commit of its branch.
        parent_commit (`str`, *optional*): hash of the commit that the branch must still be at; by default its last.
        **arguments: to `commit_folder`, with `revision` and `create_pr` among them.

    Returns:
        The full name of the repository, and the commit.
    """
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    head = branch_head(repo_id, None if arguments["create_pr"] else arguments["revision"], token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pushed"
        write(folder, repo_id, head)
        commit = commit_folder(folder, repo_id, token=token, parent_commit=parent_commit or head, **arguments)
    return repo_id, commit


def commit_folder(
    folder: Path,
    repo_id: str,
    *,
    outdated: re.Pattern[str],
    revision: str | None,
    token: bool | str | None,
    **arguments: Any,
) -> CommitInfo:
    """
    Adds the files of `folder` to the repository, and removes others that are `outdated`, in a single commit.

    `HfApi.upload_folder` would make several commits of a large folder, and whoever pulls in between would have weights
    of one push and masks of another. Whole weights of an earlier push would be loaded instead of shards of this one.

    Args:
        outdated (`re.Pattern`): names of files at the top of the repository that are of an earlier push, unless
            `folder` has them.
        **arguments: to `HfApi.create_commit`.
    """
    api = HfApi()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    there = api.list_repo_files(repo_id, revision=revision, token=token)
    removed = [name for name in there if outdated.fullmatch(name) and name not in names]
    operations: list[Any] = [CommitOperationDelete(name) for name in removed]
    operations += [CommitOperationAdd(name, file) for name, file in names.items()]
    return api.create_commit(repo_id, operations, revision=revision, token=token, **arguments)


logger = logging.getLogger(__name__)

_STOCK_PACKAGES = {"timm", "torch", "transformers"}


def backbone_packages(backbone: PreTrainedModel) -> list[str]:
    """The packages other than timm and transformers that a backbone is made with, in alphabetical order."""
    modules = {type(module).__module__ for module in backbone.modules()}
    if isinstance(backbone.config, TimmWrapperConfig):
        modules.add(model_entrypoint(backbone.config.architecture).__module__)
    return sorted({module.split(".")[0] for module in modules} - _STOCK_PACKAGES)


def save_code(model: Any, folder: Path) -> None:
    """
    Adds the code of a routed model to the folder that it was saved in, and names it in `config.json`.

    Only a copy is marked as custom code: the classes of this process stay as they are. If the backbone is of another
    package, which the folder cannot carry, nothing is added, and a warning says so.
    """
    packages = backbone_packages(model.backbone)
    if packages:
        logger.warning(
            f"the model is saved without code: its backbone is of {', '.join(packages)}, so that whoever loads it "
            f"needs that package, and `trust_remote_code=True` would not do. With it, `import {packages[0]}` first."
        )
        return
    file = folder / "config.json"
    config = json.loads(file.read_text())
    auto_classes = ((model.config, "AutoConfig"), (model, "AutoModel"), (model, model.backbone_class.__name__))
    for saved, auto_class in auto_classes:
        custom = copy.copy(saved)
        custom._auto_class = auto_class
        custom_object_save(custom, folder, config=config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
