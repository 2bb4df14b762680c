"""Failures of the machine, such as a full disk, explained to the user."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError


_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def explain_failures(folder: str | os.PathLike, *, batch_size: int) -> Iterator[None]:
    """
    A context that explains what to do about a full disk, a folder that cannot be written, or exhausted memory.

    Args:
        folder (`str` or path): the folder that the code inside writes to.
        batch_size (`int`): `route_batch_size` of the code inside.

    Raises:
        OSError: a file could not be written.
        MemoryError, torch.OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        # accelerate counts every cuDNN error as lack of memory, but it may have other causes.
        if isinstance(error, MemoryError) or (should_reduce_batch_size(error) and "CUDNN" not in str(error)):
            kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
            raise kind(
                f"out of memory with `route_batch_size` = {batch_size} ({error}). Lower it, and raise "
                "`gradient_accumulation_steps` to keep the samples of an update, or use `bf16` or "
                "`gradient_checkpointing`. What is finished is kept."
            ) from error
        reason = _reason_not_written(error, Path(folder).absolute())
        if reason is not None:
            raise OSError(
                reason[0],
                f"{reason[1]} ({_free_space(folder)} free). What is finished is kept: free some space, or make the "
                "folder writable, and give the same command again",
                str(folder),
            ) from error
        raise


def _reason_not_written(error: Exception, folder: Path) -> tuple[int, str] | None:
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        # A failed write to an open file names no file. An error in a file elsewhere, such as data, is not explained.
        ours = error.filename is None or folder in Path(str(error.filename)).absolute().parents
        return (error.errno, str(error.strerror)) if ours or error.filename == str(folder) else None
    # safetensors and torch write without Python's files, and raise other errors.
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return errno.EIO, str(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return errno.EIO, "a checkpoint could not be written"
    return None


def _free_space(folder: str | os.PathLike) -> str:
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"
