"""Fixtures of several tests of recipes."""

from __future__ import annotations

import pytest

from tests.recipes.small_texts import save_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny pretrained encoder with its tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))
