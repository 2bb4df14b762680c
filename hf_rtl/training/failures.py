"""Failures that come from the machine and not from the code, said in words."""

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
    Says of a full disk, a folder that cannot be written and of memory that ran out what can be done.

    Args:
        folder (`str` or path): what the work inside writes to.
        batch_size (`int`): of the work inside.

    Raises:
        OSError: something could not be written.
        MemoryError, torch.OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        # accelerate counts a cuDNN error as one, which may have other reasons.
        if isinstance(error, MemoryError) or (should_reduce_batch_size(error) and "CUDNN" not in str(error)):
            kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
            raise kind(
                f"out of memory with `route_batch_size` = {batch_size} ({error}). Lower it, with "
                "`gradient_accumulation_steps` to keep the samples of an update, or use `bf16` or "
                "`gradient_checkpointing`. What is finished is kept."
            ) from error
        reason = _reason_not_written(error, Path(folder).absolute())
        if reason is not None:
            raise OSError(
                reason[0],
                f"{reason[1]} ({_free_space(folder)} free). What is finished is kept: make room, or make the folder "
                "writable, and give the same command again",
                str(folder),
            ) from error
        raise


def _reason_not_written(error: Exception, folder: Path) -> tuple[int, str] | None:
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        # A write to an open file that fails names none. One that lies elsewhere, as data do, is not ours.
        ours = error.filename is None or folder in Path(str(error.filename)).absolute().parents
        return (error.errno, str(error.strerror)) if ours or error.filename == str(folder) else None
    # safetensors and torch write without Python's files, and have errors of their own.
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return errno.EIO, str(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return errno.EIO, "a checkpoint could not be written"
    return None


def _free_space(folder: str | os.PathLike) -> str:
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"
