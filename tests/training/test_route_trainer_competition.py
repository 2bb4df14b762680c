"""Joint retraining in which membership tickets compete for the same samples."""

import copy

import pytest
import torch

from hf_rtl import RTLTrainer
from hf_rtl.data.sampling import ALL_ROUTES
from tests.training.small_runs import (
    DOMAINS,
    ROUTES,
    Images,
    Recorder,
    contents,
    image_model,
    make_trainer,
    run,
    same,
    timeless,
)


COMPETING = {"target_sparsity": [0.5], "num_train_epochs": 2, "competing_epochs": 1}


def test_a_competing_step_is_that_of_one_softmax(tmp_path, monkeypatch):
    """Against a step by hand: each ticket scores the samples alone, then cross-entropy of the scores and SGD."""
    steps = []
    original = RTLTrainer.training_step

    def watched(self, model, inputs, *arguments):
        route = inputs["route"]
        before = copy.deepcopy(self.model)
        batch = {name: value for name, value in inputs.items() if name != "route"}
        loss = original(self, model, inputs, *arguments)
        steps.append((route, before, batch, loss.detach(), copy.deepcopy(self.model)))
        return loss

    monkeypatch.setattr(RTLTrainer, "training_step", watched)
    values = {**COMPETING, "optim": "sgd", "learning_rate": 0.1, "route_batch_size": 12, "save_strategy": "no"}
    made = run(tmp_path / "run", image_model(drop_rate=0.0), **values)
    routes = [route for route, *_ in steps]
    half = len(routes) // 2
    assert routes[:half] == [0, 1, 2] * (half // 3) and routes[half:] == [ALL_ROUTES] * half
    for index in range(half, len(steps) - 1):
        _, before, batch, loss, after = steps[index]
        assert batch["pixel_values"].shape[0] == 12 // 3 and batch["labels"].max() < 3
        tickets = [before.extract_ticket(name).eval() for name in ROUTES]
        scores = torch.cat([ticket(pixel_values=batch["pixel_values"]).logits for ticket in tickets], dim=1).double()
        rows = [row.exp()[label] / row.exp().sum() for row, label in zip(scores, batch["labels"], strict=True)]
        expected = -torch.stack(rows).log().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        new = steps[index + 1][1]
        for weight, name in enumerate(before.mask_bank.weight_names):
            gradient = sum(
                ticket.get_parameter(name).grad * before.mask_bank[k][weight] for k, ticket in enumerate(tickets)
            )
            moved = before.backbone.get_parameter(name) - 0.1 * gradient
            found = new.backbone.get_parameter(name)
            assert torch.allclose(found, moved, rtol=1e-4, atol=1e-7)
            outside = ~before.mask_bank.union()[weight]
            assert same(found[outside], before.backbone.get_parameter(name)[outside]) and outside.any()
        bias = new.backbone.get_parameter("timm_model.fc.bias")
        gradient = sum(ticket.get_parameter("timm_model.fc.bias").grad for ticket in tickets)
        assert torch.allclose(bias, before.backbone.get_parameter("timm_model.fc.bias") - 0.1 * gradient, rtol=1e-4)
        # No statistics have moved.
        for rows_before, rows_after in zip(before.norm_statistics.rows, after.norm_statistics.rows, strict=True):
            assert same(rows_before, rows_after)
    assert made.model.routes_since_update <= {0, 1, 2}


@pytest.mark.slow
def test_competition_goes_on_as_if_not_interrupted(tmp_path):
    values = {**COMPETING, "route_batch_size": 12, "num_train_epochs": 3, "competing_epochs": 2}
    values |= {"save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path / "whole", **values)

    class Stop(Recorder):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step >= 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", callbacks=[Stop()], **values)
    continued = run(tmp_path / "broken", **values)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert timeless(continued.rounds[0]["metrics"]) == timeless(whole.rounds[0]["metrics"])
    assert contents(tmp_path / "whole") != contents_without_competition(tmp_path / "plain", values)


def contents_without_competition(folder, values):
    run(folder, **{**values, "competing_epochs": 0})
    return contents(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 10}, "`competing_epochs` = 1 are the last of `num_train_epochs`, which `max_steps` = 10"),
        ({"num_train_epochs": 1.5}, "at most `num_train_epochs`, which must be a whole number, got 1.5"),
        ({"competing_epochs": 3}, "`competing_epochs` = 3 must be at most `num_train_epochs`"),
        ({"competing_epochs": -1}, "`competing_epochs` must be at least 0, got -1"),
        ({"gradient_checkpointing": True}, "needs the masks of all routes at once"),
        ({"route_batch_size": 2}, "take a multiple of 3"),
    ],
)
def test_bad_competition_is_refused_at_once(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **{**COMPETING, **values})
    assert not (tmp_path / "run").exists()


def test_tickets_for_labels_do_not_compete(tmp_path):
    model = image_model(ticket_task="labels", num_labels=2)
    data = {"train": Images(24, 0, DOMAINS), "evaluate": Images(12, 1, DOMAINS), "route_column": "domain"}
    with pytest.raises(ValueError, match="compares the scores of membership tickets"):
        make_trainer(tmp_path / "run", model, **data, **COMPETING)


@pytest.mark.slow
def test_an_error_in_a_competing_step_leaves_nothing_behind(tmp_path, monkeypatch):
    """The same call again ends as a run without the error."""
    made = make_trainer(tmp_path / "run", **COMPETING)
    with monkeypatch.context() as broken:
        broken.setattr(torch.nn.functional, "cross_entropy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.train()
    made.train()
    run(tmp_path / "whole", **COMPETING)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
