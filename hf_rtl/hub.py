"""Pushes to the Hub in a single commit, so that who pulls never has weights of one push and masks of another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError


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
        return Path(hf_hub_download(repo_id, "README.md", revision=revision, token=token)).read_bytes()
    except RemoteEntryNotFoundError:
        return b""


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

    `HfApi.upload_folder` would make several of a large folder, and who pulls in between would have weights of one push
    and masks of another. Whole weights of an earlier push would be loaded instead of the shards of this one.

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
