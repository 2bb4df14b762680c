"""A callback that watches masks: its reports, its warnings, and the round at which it ends a run."""

import json
import logging

import pytest
import torch

from hf_rtl import CollapseMonitor, MaskBank, RTLModel, RTLTrainerCallback
from hf_rtl.analysis import ticket_similarity
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.pruning import prune
from hf_rtl.training import ranking
from hf_rtl.training.plan import Round
from tests.training.interruptions import StopAtStep, StopError
from tests.training.small_runs import ROUNDS, ROUTES, Recorder, contents, files, make_trainer, run, same


# Fourteen prune events in three rounds; the last round has five.
GRADUAL = {
    "target_sparsity": [0.3, 0.6, 0.8],
    "prune_amount": 0.12,
    "extraction_steps": 1,
    "max_steps": 3,
    "allow_disconnected": True,
}
FOLDERS = ["round-01-sparsity-0.3", "round-02-sparsity-0.6", "round-03-sparsity-0.8"]
COLLAPSE_AT = 0.65


@pytest.fixture
def collapsing(monkeypatch):
    """From `COLLAPSE_AT` on, every ticket loses different random weights, so that similarity falls."""

    def planted(weights, masks, *, num_kept, **options):
        total = sum(mask.numel() for mask in masks)
        if 1 - num_kept / total > COLLAPSE_AT:
            named = {str(layer): weight for layer, weight in enumerate(weights)}
            generator = torch.Generator().manual_seed(int(hash_tensors(named)[:8], 16))
            weights = [torch.rand(weight.shape, generator=generator) for weight in weights]
        return prune(weights, masks, num_kept=num_kept, **options)

    monkeypatch.setattr(ranking, "prune", planted)


def read_warnings(caplog):
    return [record.message for record in caplog.records if record.name == "hf_rtl.training.callbacks"]


@pytest.mark.long
@pytest.mark.slow
def test_a_monitored_run_is_the_same_with_more_in_its_reports(finished, tmp_path, caplog):
    monitor, recorded = CollapseMonitor(), Recorder()
    made = run(tmp_path / "run", callbacks=[monitor, recorded])
    assert contents(tmp_path / "run") == contents(finished.folder)
    assert [point.sparsity for point in monitor.points] == pytest.approx([0.3, 0.51, 0.6], abs=1e-3)
    assert monitor.changes == {} and read_warnings(caplog) == []
    for name, report in zip(ROUNDS, made.rounds, strict=True):
        point = ticket_similarity(RTLModel.from_pretrained(tmp_path / "run" / name).mask_bank)
        expected = {
            "similarity/mean": point.similarity.mean(),
            "similarity/mean_chance": point.chance.mean(),
            "similarity/mean_excess": point.excess.mean(),
        }
        for route, route_name in enumerate(ROUTES):
            expected[f"similarity/{route_name}/jaccard"] = point.similarity[route]
            expected[f"similarity/{route_name}/chance"] = point.chance[route]
            expected[f"similarity/{route_name}/excess"] = point.excess[route]
        assert {key: value for key, value in report.items() if key.startswith("similarity/")} == expected
        assert report["similarity/mean"] == pytest.approx(report["mean_similarity"])
        assert json.loads((tmp_path / "run" / name / "round.json").read_text()) == report
        (logged,) = (
            log for step, log in recorded.logs if log["round"] == report["round"] and "similarity/mean" in log
        )
        assert expected.items() <= logged.items()
        assert any("similarity/mean" in entry for entry in report["log_history"])


@pytest.mark.slow
def test_masks_of_all_prune_events_are_seen_once(tmp_path):
    class Seen(RTLTrainerCallback):
        calls = []

        def on_tickets_found(self, args, state, control, *, round, banks, figures, **kwargs):
            figures["seen"] = float(len(banks))
            self.calls.append((round.name, [bank.fingerprint() for bank in banks], [b.route_names for b in banks]))

    run(tmp_path / "run")
    for _ in range(2):  # also if all masks are on disk from an unwatched run
        Seen.calls.clear()
        made = run(tmp_path / "run", callbacks=[Seen()])
        assert [report["seen"] for report in made.rounds] == [1, 2]
        assert [name for name, _, _ in Seen.calls] == ROUNDS
        assert [prints[-1] for _, prints, _ in Seen.calls] == [report["mask_fingerprint"] for report in made.rounds]
        bank = MaskBank(list(zip(made.model.mask_bank.weight_names, made.model.mask_bank.shapes, strict=True)), ROUTES)
        for route in range(3):
            bank.set_packed(route, made.run_directory.load_mask(1, route))
        assert Seen.calls[1][1][0] == bank.fingerprint()
        assert all(names == ROUTES for _, _, of_banks in Seen.calls for names in of_banks)


@pytest.mark.slow
def test_a_collapse_is_warned_of_once(tmp_path, collapsing, caplog):
    monitor = CollapseMonitor()
    made = run(tmp_path / "run", callbacks=[monitor], **{**GRADUAL, "target_sparsity": [0.3, 0.6, 0.8, 0.85]})
    assert [report["folder"] for report in made.rounds] == [*FOLDERS, "round-04-sparsity-0.85"]
    (warning,) = read_warnings(caplog)
    assert set(monitor.changes) == set(ROUTES)
    for name, change in monitor.changes.items():
        assert change.direction == "down" and change.sparsity > COLLAPSE_AT
        assert (
            f"{name!r} down at {change.sparsity:.1%} sparsity ({change.before:.3f} to {change.found:.3f})" in warning
        )
    assert "Compare 'round-03-sparsity-0.8' with 'round-02-sparsity-0.6' before you use it" in warning


@pytest.mark.slow
def test_without_a_collapse_nothing_stops(tmp_path, caplog):
    made = run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True)], **GRADUAL)
    assert len(made.rounds) == 3 and read_warnings(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize("every_round", [True, False])
def test_a_run_that_collapses_ends_with_the_round_before(tmp_path, collapsing, caplog, every_round):
    options = {**GRADUAL, "retrain_every_round": every_round}
    made = run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True)], **options)
    # It equals a run without the last round.
    run(tmp_path / "short", **{**options, "target_sparsity": [0.3, 0.6]})
    stopped, short = contents(tmp_path / "run"), contents(tmp_path / "short")
    assert {name for name in stopped if "extraction" not in name} == {
        name for name in short if "extraction" not in name
    }
    assert all(stopped[name] == short[name] for name in short)
    assert [report["folder"] for report in made.rounds] == (FOLDERS[:2] if every_round else FOLDERS[1:2])
    assert made.rounds[-1]["similarity/mean"] == pytest.approx(made.rounds[-1]["mean_similarity"])
    final = RTLModel.from_pretrained(tmp_path / "run" / "final")
    assert final.mask_bank.fingerprint() == made.model.mask_bank.fingerprint() == made.rounds[-1]["mask_fingerprint"]
    assert all(same(made.model.state_dict()[name], tensor) for name, tensor in final.state_dict().items())
    (warning,) = read_warnings(caplog)
    assert "The run ends here: 'round-02-sparsity-0.6' is the last round, 'round-03-sparsity-0.8' is not" in warning


@pytest.mark.long
@pytest.mark.slow
def test_a_stopped_run_goes_on_only_without_a_monitor(tmp_path, collapsing):
    run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True)], **GRADUAL)
    before = files(tmp_path / "run")
    recorded = Recorder()
    again = run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True), recorded], **GRADUAL)
    again.train()
    assert len(again.rounds) == 2 and recorded.calls["step_end"] == 0
    assert files(tmp_path / "run") == before
    run(tmp_path / "run", **GRADUAL)
    run(tmp_path / "unwatched", **GRADUAL)
    assert contents(tmp_path / "run") == contents(tmp_path / "unwatched")


@pytest.mark.slow
def test_an_interrupted_run_stops_at_the_same_place(tmp_path, collapsing):
    monitor = CollapseMonitor(stop_on_collapse=True)
    made = make_trainer(tmp_path / "run", callbacks=[monitor, StopAtStep(5)], **GRADUAL)
    with pytest.raises(StopError):
        made.train()
    made.remove_callback(StopAtStep)
    made.train()
    run(tmp_path / "whole", callbacks=[CollapseMonitor(stop_on_collapse=True)], **GRADUAL)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    # The monitor has started again, and has no point twice.
    assert len(monitor.points) == len(made.plan().rounds[-1].events) + made.plan().rounds[-1].first_event


def test_in_the_first_round_there_is_nothing_to_keep(tmp_path, collapsing, caplog):
    options = {**GRADUAL, "target_sparsity": [0.8]}
    made = run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True)], **options)
    assert [report["folder"] for report in made.rounds] == ["round-01-sparsity-0.8"]
    (warning,) = read_warnings(caplog)
    assert "so there is no earlier round to keep; to get one, add a lower value to `target_sparsity`" in warning


def test_other_callbacks_can_stop_a_run_too_but_not_before_its_first_round(tmp_path):
    class Stop(RTLTrainerCallback):
        def on_tickets_found(self, args, state, control, **kwargs):
            control.should_training_stop = True

    made = run(tmp_path / "run", callbacks=[CollapseMonitor(stop_on_collapse=True), Stop(), CollapseMonitor()])
    assert [report["folder"] for report in made.rounds] == ROUNDS[:1]


def test_a_model_with_one_ticket_has_no_similarity(caplog):
    bank = MaskBank([("weight", (20,))], ["only"])
    monitor, figures = CollapseMonitor(), {}
    for index in range(6):
        bank["only"] = [torch.arange(20) < 18 - 2 * index]
        round_ = Round(index, f"round-{index}", 0.1 + index / 10, [18 - 2 * index], index, retrained=True)
        monitor.on_tickets_found(None, None, None, round=round_, banks=[bank], figures=figures)
    assert figures == {} and monitor.changes == {} and len(monitor.points) == 6
    assert logging.getLogger("hf_rtl.training.callbacks") and read_warnings(caplog) == []
