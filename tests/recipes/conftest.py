"""Fixtures of several tests of recipes."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pytest

from hf_rtl.modeling import modeling_rtl
from shared import one_pass
from tests.modeling.small_backbones import units_found_once
from tests.recipes.small_texts import save_encoder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it has read in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(autouse=True, scope="module")
def _units_found_once() -> Iterator[None]:
    with units_found_once(modeling_rtl, one_pass):
        yield


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny pretrained encoder with its tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))
