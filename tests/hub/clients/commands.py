"""The `hf-rtl` command."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from hf_rtl_cli.main import main
from tests.hub.clients.models import describe, make_model


def save(folder: str, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    model = make_model("vit", seed=seed)
    model.save_pretrained(folder, **options)
    return describe(model)


def command(*arguments: str) -> str:
    """The output of `hf-rtl`. Raises `RuntimeError` with its error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(list(arguments))
    if status:
        raise RuntimeError(errors.getvalue())
    return output.getvalue()
