"""The `hf-rtl` command, on a saved model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_rtl import RTLModelForImageClassification
from hf_rtl.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["cat", "dog"], ticket_task="membership", seed=0
    )
    masks = model.mask_bank["dog"]
    masks[0].view(-1)[:10] = False
    model.mask_bank["dog"] = masks
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_inspect_prints_routes_and_counts(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "cat" in printed and "dog" in printed and "membership" in printed


def test_inspect_as_json(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    kept = {route["name"]: route["kept"] for route in status["routes"]}
    assert kept["cat"] - kept["dog"] == 10 and status["union"] == kept["cat"] == status["num_prunable"]


@pytest.mark.parametrize("content", [None, '{"model_type": "rtl", "architectures": ["os.system"]}'])
def test_what_is_no_model_is_an_error_of_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("hf-rtl inspect: error: ")
