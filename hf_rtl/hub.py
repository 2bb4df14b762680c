"""Pushes to the Hub in a single commit, so that who pulls never has weights of one push and masks of another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi


_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def branch_head(repo_id: str, revision: str | None, *, token: bool | str | None) -> str | None:
    """The last commit of a branch, which is made if it is not there."""
    api = HfApi()
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return api.model_info(repo_id, revision=revision, token=token).sha


def commit_folder(
    folder: Path, repo_id: str, *, revision: str | None, token: bool | str | None, **arguments: Any
) -> CommitInfo:
    """
    Makes the files of `folder` those of the repository, and its weights the only ones, in a single commit.

    `HfApi.upload_folder` would make several of a large folder, and who pulls in between would have weights of one push
    and masks of another. Whole weights of an earlier push would be loaded instead of the shards of this one.

    Args:
        **arguments: to `HfApi.create_commit`.
    """
    api = HfApi()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    there = api.list_repo_files(repo_id, revision=revision, token=token)
    outdated = [name for name in there if _WEIGHT_FILE.fullmatch(name) and name not in names]
    operations: list[Any] = [CommitOperationDelete(name) for name in outdated]
    operations += [CommitOperationAdd(name, file) for name, file in names.items()]
    return api.create_commit(repo_id, operations, revision=revision, token=token, **arguments)
