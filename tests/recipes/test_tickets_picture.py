"""`recipes/pages/tickets_picture.py`: the picture of the start pages is the one that its script draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pages import tickets_picture


def test_the_picture_in_the_documentation_is_the_drawn_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tickets_picture.FILE
    monkeypatch.setattr(tickets_picture, "FILE", tmp_path / "tickets.png")
    tickets_picture.main()
    before, now = (np.asarray(Image.open(file).convert("L"), dtype=float) for file in (kept, tmp_path / "tickets.png"))
    assert before.shape == now.shape
    # Letters may be drawn a little differently by another version of matplotlib.
    assert np.abs(before - now).mean() < 2
    assert kept.stat().st_size < 150_000


def test_every_ticket_keeps_half_of_the_weights_and_no_two_the_same() -> None:
    masks = tickets_picture.tickets(seed=1)
    assert masks.sum((1, 2)).tolist() == [32, 32, 32]
    assert len({mask.tobytes() for mask in masks}) == 3
    assert set(np.unique(masks.sum(0))) == {0, 1, 2, 3}  # the legend has a colour for each
