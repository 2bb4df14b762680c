"""Failures of the machine are explained in words; all other errors pass unchanged."""

import errno
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from hf_rtl.training.failures import explain_failures


def explained(tmp_path, work):
    with explain_failures(tmp_path / "run", batch_size=64):
        work()


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_names_the_folder_the_reason_and_the_way_out(tmp_path, number):
    with pytest.raises(OSError) as raised:
        explained(tmp_path, raising(OSError(number, os.strerror(number), str(tmp_path / "run" / "file"))))
    assert raised.value.errno == number
    assert isinstance(raised.value.__cause__, OSError)
    for text in (os.strerror(number), str(tmp_path / "run"), "MiB free", "What is finished is kept", "same command"):
        assert text in str(raised.value)


@pytest.mark.parametrize("writer", ["safetensors", "torch", "python"])
def test_a_full_disk_is_recognised_whoever_writes(tmp_path, writer):
    """A limit of the operating system keeps files from growing beyond a size."""
    file = tmp_path / "file"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            if writer == "safetensors":
                save_file({"x": torch.zeros(10**6)}, file)
            elif writer == "torch":
                torch.save(torch.zeros(10**6), file)
            else:
                file.write_text("x" * 10**6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(OSError, match="What is finished is kept"):
        explained(tmp_path, write)


def test_memory_that_runs_out_names_the_batch_size(tmp_path):
    errors = {
        MemoryError: lambda: torch.empty(2**50),
        torch.OutOfMemoryError: raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    }
    for kind, work in errors.items():
        with pytest.raises(kind, match="`route_batch_size` = 64 .*`gradient_accumulation_steps`"):
            explained(tmp_path, work)
    with pytest.raises(MemoryError, match="`route_batch_size` = 64"):
        explained(tmp_path, raising(MemoryError()))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("`x` is wrong"),
        RuntimeError("shapes do not match"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "data.csv"),
        PermissionError(errno.EACCES, "Permission denied", "data.csv"),  # not a folder of the run
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
        KeyboardInterrupt(),
    ],
)
def test_other_failures_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        explained(tmp_path, raising(error))
    assert raised.value is error
