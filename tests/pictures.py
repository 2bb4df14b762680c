"""A ready picture for model cards: drawing one takes longer than all else in most tests that write a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_rtl.plots
from hf_rtl.modeling.files import write_bytes


PICTURE = (Path(__file__).parents[1] / "model_cards" / "digits-similarity.png").read_bytes()
draw_similarity = hf_rtl.plots.similarity_heatmap


def put_picture(matrix: Any, names: Any, file: Path, **options: Any) -> None:
    """Writes `PICTURE`, whatever is to be drawn, as `similarity_heatmap` writes its own."""
    write_bytes(file, PICTURE)
