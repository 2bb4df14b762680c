"""Files of a run: they are whole or missing, and only the run that they belong to continues them."""

import json

import pytest
import torch

import hf_rtl.modeling.files
from hf_rtl.modeling.mask_bank import MaskBank, pack
from hf_rtl.training.run_directory import RunDirectory


PACKED = [pack(mask) for mask in (torch.arange(15).view(3, 5) % 2 == 0, torch.arange(8).view(8, 1) < 3)]


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_masks_come_back_and_damaged_ones_do_not(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.load_mask(2, 1) is None
    directory.save_mask(2, 1, PACKED, started_from="abc")
    loaded = directory.load_mask(2, 1)
    assert all(torch.equal(*pair) and pair[0].dtype == torch.uint8 for pair in zip(loaded, PACKED, strict=True))
    assert directory.load_mask(1, 2) is None
    file = directory.mask_file(2, 1)
    assert file.parent.parent == tmp_path / "extraction"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert directory.load_mask(2, 1) is None


def test_every_route_and_event_has_a_file_of_its_own(tmp_path):
    directory = RunDirectory(tmp_path)
    names = {directory.mask_file(event, route) for event in range(120) for route in range(120)}
    assert len(names) == 120 * 120


CONFIGURATION = {"seed": 1, "sparsity": [0.5], "model": {"norm_statistics": "shared"}}
EXTRACTION = {"seed": 1}
VERSIONS = {"torch": "2"}


def test_a_run_is_continued_with_the_same_configuration(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    before = files(tmp_path)
    assert {path.name for path in before} == {"run.json", "extraction.json"}
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written == {"configuration": CONFIGURATION, "surroundings": VERSIONS}
    # Tuples become lists in JSON; other versions do not stop a run.
    RunDirectory(tmp_path / "run").open({**CONFIGURATION, "sparsity": (0.5,)}, EXTRACTION, {"torch": "3"})
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "named", "left_out"),
    [
        ({"seed": 2}, ["seed: 1 there, 2 now"], ["sparsity"]),
        ({"sparsity": [0.5, 0.75]}, ["sparsity: [0.5] there, [0.5, 0.75] now"], ["seed:"]),
        ({"new": "x"}, ['new: null there, "x" now'], ["seed:"]),
        (
            {"seed": 2, "model": {"norm_statistics": "per_route"}},
            ["seed: 1 there, 2 now", 'model.norm_statistics: "shared" there, "per_route" now'],
            ["sparsity", "model: "],
        ),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(tmp_path, changed, named, left_out):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    before = files(tmp_path)
    with pytest.raises(ValueError) as raised:
        RunDirectory(tmp_path).open({**CONFIGURATION, **changed}, EXTRACTION, VERSIONS)
    for text in [*named, "another `output_dir`", f"extraction_dir='{tmp_path / 'extraction'}'"]:
        assert text in str(raised.value)
    for text in left_out:
        assert text not in str(raised.value)
    assert files(tmp_path) == before


def test_a_missing_value_is_named(tmp_path):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    with pytest.raises(ValueError, match="seed: 1 there, null now"):
        RunDirectory(tmp_path).open({k: v for k, v in CONFIGURATION.items() if k != "seed"}, EXTRACTION, VERSIONS)


def test_differences_in_long_values_are_named_whole(tmp_path):
    names, text = [f"layer.{index}" for index in range(1000)], "a text " * 20
    RunDirectory(tmp_path).open({"prunable": names, "outer": {"inner": text}}, {}, VERSIONS)
    with pytest.raises(ValueError) as raised:
        other = {"prunable": [*names[:700], "other", *names[701:]], "outer": {"inner": text + "more"}}
        RunDirectory(tmp_path).open(other, {}, VERSIONS)
    named = f'prunable[700]: "layer.700" there, "other" now; outer.inner: "{text}" there, "{text}more" now)'
    assert named in str(raised.value)
    with pytest.raises(ValueError, match="and 988 more"):
        RunDirectory(tmp_path).open({"prunable": ["other"] * 1000, "outer": {"inner": text}}, {}, VERSIONS)


def test_masks_that_do_not_fit_are_not_offered(tmp_path):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    with pytest.raises(ValueError, match="another `output_dir`") as raised:
        RunDirectory(tmp_path).open({**CONFIGURATION, "seed": 2}, {"seed": 2}, VERSIONS)
    assert "to keep them" not in str(raised.value)


def test_extracted_masks_are_shared_by_runs_that_agree_on_them(tmp_path):
    shared = tmp_path / "masks"
    first = RunDirectory(tmp_path / "first", shared)
    first.open(CONFIGURATION, EXTRACTION, VERSIONS)
    first.save_mask(0, 0, PACKED)
    second = RunDirectory(tmp_path / "second", shared)
    second.open({**CONFIGURATION, "model": {"norm_statistics": "per_route"}}, EXTRACTION, VERSIONS)
    assert second.load_mask(0, 0) is not None
    before = files(tmp_path)
    third = RunDirectory(tmp_path / "third", shared)
    with pytest.raises(ValueError, match="seed: 1 there, 2 now.*`extraction_dir`"):
        third.open({**CONFIGURATION, "seed": 2}, {"seed": 2}, VERSIONS)
    assert files(tmp_path) == before  # the third run has not even a run.json


REPORT_OF_A_ROUND = {
    **{"round": 1, "kept": {"ant": 3}, "folder": "round-01-sparsity-0.5", "mask_fingerprint": "ab", "steps": 7},
    **{"log_history": [{"loss": 0.5}], "train_loss": 0.5, "thresholds": None, "metrics": None},
}
METRICS = {"eval_loss": 0.5}


def finished_round(tmp_path):
    folder = tmp_path / "round-01-sparsity-0.5"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("not ours")
    written = RunDirectory(tmp_path).mark_retrained(folder, REPORT_OF_A_ROUND)
    assert RunDirectory(tmp_path).read_report(folder) == written
    RunDirectory(tmp_path).write_report(folder, {**written, "metrics": METRICS})
    assert not (folder / "retrained.json").exists()
    return folder, {**written, "metrics": METRICS}


def test_a_finished_round_comes_back(tmp_path):
    folder, written = finished_round(tmp_path)
    assert written == {**REPORT_OF_A_ROUND, "metrics": METRICS, "files": written["files"]}
    assert set(written["files"]) == {"model.safetensors", "config.json"}
    (folder / "notes.txt").unlink()
    (folder / "more.json").write_text("{}")
    assert RunDirectory(tmp_path).read_report(folder) == written


@pytest.mark.parametrize("damage", ["altered", "missing", "half a report", "other report"])
def test_a_damaged_round_is_not_finished(tmp_path, caplog, damage):
    folder, _ = finished_round(tmp_path)
    if damage == "altered":
        (folder / "model.safetensors").write_bytes(b"weighty")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage == "half a report":
        (folder / "round.json").write_text((folder / "round.json").read_text()[:-10])
    else:
        (folder / "round.json").write_text("{}")
    named = "round.json" if "report" in damage else "model.safetensors"
    assert RunDirectory(tmp_path).read_report(folder) is None
    assert [record.message for record in caplog.records] == [
        f"{named} in {str(folder)!r} is damaged: the joint retraining is done again."
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda report: [report],
        lambda report: {**report, "files": {"/dev/zero": 64 * "0"}},
        lambda report: {**report, "files": [1]},
        lambda report: {**report, "steps": "7"},
        lambda report: {name: value for name, value in report.items() if name != "log_history"},
    ],
)
def test_a_report_that_no_run_has_written_is_damaged(tmp_path, caplog, change):
    folder, report = finished_round(tmp_path)
    (folder / "round.json").write_text(json.dumps(change(report)))
    assert RunDirectory(tmp_path).read_report(folder) is None
    assert "is damaged: the joint retraining is done again." in caplog.text


def test_masks_of_another_bank_are_none(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.save_mask(2, 1, PACKED)
    bank = MaskBank([("a", (3, 5)), ("b", (8, 1))], ["x"])
    assert directory.load_mask(2, 1, bank) is not None
    assert directory.load_mask(2, 1, MaskBank([("a", (3, 5)), ("b", (9, 1))], ["x"])) is None


def test_a_round_that_was_not_finished_is_no_damage(tmp_path, caplog):
    assert RunDirectory(tmp_path).read_report(tmp_path / "round-01-sparsity-0.5") is None
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"configuration": {}}', '{"configuration": 5, "surroundings": 5}', "[" * 10**5 + "]" * 10**5],
)
@pytest.mark.parametrize("name", ["run.json", "extraction/extraction.json"])
def test_settings_that_cannot_be_read_are_refused(tmp_path, name, content):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    (tmp_path / name).write_text(content)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"{name}' is damaged.*Delete the folder"):
        RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    assert files(tmp_path) == before


def test_other_surroundings_are_warned_of(tmp_path, caplog):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "2", "device": "cpu"})
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "2", "device": "cpu"})
    assert not caplog.records
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "3", "device": "cpu"})
    assert len(caplog.records) == 2  # one for the run, one for its masks
    assert all('torch: "2" there, "3" now' in record.message for record in caplog.records)
    assert all("device" not in record.message for record in caplog.records)


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_of_others(tmp_path, monkeypatch):
    shared = tmp_path / "masks"
    directory = RunDirectory(tmp_path / "run", shared)
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    (tmp_path / "run" / "round-01-sparsity-0.5").mkdir()
    (tmp_path / "run" / "round-02-sparsity-0.7").mkdir()
    (tmp_path / "run" / "round-02-sparsity-0.7" / "round.json").write_text("{}")
    (tmp_path / "run" / ".final-x1y2.tmp").mkdir()
    names = [".run.json.17.tmp", "round-01-sparsity-0.5/.round.json.17.tmp", ".final-x1y2.tmp/model.safetensors"]
    names.append("round-02-sparsity-0.7/retrained.json")  # killed after its round.json was written
    left = [tmp_path / "run" / name for name in names]
    of_others = [tmp_path / "run" / ".editor.tmp", shared / "event-000" / ".notes.tmp"]
    of_others.append(tmp_path / "run" / "round-01-sparsity-0.5" / "retrained.json")
    monkeypatch.setattr(hf_rtl.modeling.files.os, "replace", lambda source, target: None)  # killed before the renaming
    for run in ("run", "another"):
        RunDirectory(tmp_path / run, shared).save_mask(0, 0, PACKED)
    monkeypatch.undo()
    written = sorted(shared.glob("event-000/.*.tmp"), key=lambda path: path.stat().st_mtime_ns)
    assert len(written) == 2
    for file in left + of_others:
        file.write_text("")
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    assert not any(file.exists() for file in [*left, written[0]])
    assert all(file.exists() for file in [*of_others, written[1]])
