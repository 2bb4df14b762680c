"""The effect of options on a run."""

from itertools import chain

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import TrainerCallback

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLTrainer
from hf_rtl.training.optim import MaskedAdamW, MaskedSGD
from tests.training.small_runs import (
    DOMAINS,
    ROUNDS,
    ROUTES,
    Images,
    Recorder,
    arguments,
    bits,
    contents,
    image_model,
    run,
    same,
    timeless,
)


def test_only_the_last_round_is_retrained_if_asked(finished, tmp_path):
    recorded = Recorder()
    made = run(tmp_path / "run", callbacks=[recorded], retrain_every_round=False)
    assert [report["folder"] for report in made.rounds] == [ROUNDS[1]]
    assert not (tmp_path / "run" / ROUNDS[0]).exists()
    assert recorded.calls["train_begin"] == 1
    ours, theirs = contents(tmp_path / "run"), contents(finished.folder)
    assert all(ours[path] == theirs[path] for path in ours)


@pytest.mark.parametrize("scope", ["layer", "global_normalised"])
def test_scopes_of_pruning(finished, tmp_path, scope):
    bank = run(tmp_path / "run", prune_scope=scope, target_sparsity=[0.3]).model.mask_bank
    assert bank.count().tolist() == [bank.num_weights - round(0.3 * bank.num_weights)] * 3
    shares = bank.density(per_layer=True)
    if scope == "layer":
        assert torch.allclose(shares, torch.tensor(0.7, dtype=torch.float64), atol=0.01)
    assert bank.fingerprint() != finished.rounds[0]["mask_fingerprint"]


def test_a_single_route_is_plain_iterative_pruning(tmp_path):
    data = Images(24, columns=DOMAINS, num_routes=1)
    model = image_model(routes=["all"], ticket_task="labels", num_labels=2)
    made = run(tmp_path / "run", model, train=data, evaluate=data, route_column="domain")
    assert [report["mean_similarity"] for report in made.rounds] == [None, None]
    assert made.rounds[-1]["union"] == made.rounds[-1]["core"] == made.rounds[-1]["kept"]["all"]


@pytest.mark.slow
def test_membership_of_a_column_that_is_no_label(tmp_path):
    """The labels of the data are not read."""
    made = []
    for columns in (DOMAINS, DOMAINS[::2]):
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        made.append(run(tmp_path / str(len(columns)), target_sparsity=[0.3], **data))
    assert timeless(made[0].rounds[-1]["metrics"]) == timeless(made[1].rounds[-1]["metrics"])
    assert "eval_ant/auroc" in made[0].rounds[-1]["metrics"]


@pytest.mark.slow
def test_workers_that_fetch_data_change_nothing(tmp_path, monkeypatch):
    """
    A first batch, a prune event of three routes, two epochs of joint retraining, and three evaluations each start
    workers. With persistent workers both phases share one set, and evaluation has one. The rehearsal's evaluation, of
    other samples, starts its own.
    """
    starts = []
    original = _MultiProcessingDataLoaderIter.__init__

    def start(self, *positional, **keywords):
        starts.append(1)
        original(self, *positional, **keywords)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", start)

    def files_of_run(name, **values):
        several = {"extraction_steps": 4, "num_train_epochs": 2, "eval_strategy": "epoch"}
        starts.clear()
        run(tmp_path / name, target_sparsity=[0.3], **several, **values)
        return contents(tmp_path / name)

    plain = files_of_run("plain")
    assert files_of_run("workers", dataloader_num_workers=2) == plain
    assert len(starts) == 1 + 3 + 2 + 3 + 1
    assert files_of_run("persistent", dataloader_num_workers=2, dataloader_persistent_workers=True) == plain
    assert len(starts) == 2 + 1


def test_the_learning_rate_follows_its_schedule_anew_in_every_round(tmp_path):
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], lr_scheduler_type="linear")
    rates = [logs["learning_rate"] for _, logs in recorded.logs if "learning_rate" in logs]
    assert len(rates) == 12
    assert rates[:6] == rates[6:]
    assert rates[0] == max(rates) > 4 * min(rates)


@pytest.mark.slow
def test_every_round_has_a_fresh_optimizer(tmp_path, monkeypatch):
    made = []
    original = RTLTrainer.create_optimizer

    def create(self, model=None):
        assert self.optimizer is None
        optimizer = original(self, model)
        made.append((optimizer, len(optimizer.state)))
        return optimizer

    monkeypatch.setattr(RTLTrainer, "create_optimizer", create)
    run(tmp_path / "run")
    _, (first, first_state), (second, second_state) = made  # the first is that of the rehearsal
    assert first is not second
    assert first_state == second_state == 0
    assert isinstance(first, MaskedAdamW)


@pytest.mark.parametrize(
    ("optim", "optimizer_class"),
    [
        ("sgd", MaskedSGD),
        ("adamw_torch", MaskedAdamW),
        ("adamw_torch_fused", MaskedAdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_updates_are_masked_whatever_the_optimizer(tmp_path, optim, optimizer_class):
    class Watch(TrainerCallback):
        steps = 0

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.routes_since_update.update(range(3))  # the state after a step that a scaler skipped

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.weights = [bits(weight).clone() for weight in model.masker.weights]
            (self.route,) = model.routes_since_update
            inner = optimizer.optimizer
            assert type(inner) is optimizer_class
            assert {group["weight_decay"] for group in inner.param_groups} == {0.1, 0.0}

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            masks = [mask.flatten().repeat_interleave(4) for mask in model.mask_bank[self.route]]
            moved = [bits(weight) != old for weight, old in zip(model.masker.weights, self.weights, strict=True)]
            assert not any((changed & ~mask).any() for changed, mask in zip(moved, masks, strict=True))
            assert all(changed.any() for changed in moved)
            self.steps += 1

    watch = Watch()
    options = {"target_sparsity": [0.3], "weight_decay": 0.1, "max_grad_norm": 1.0, "learning_rate": 0.01}
    run(tmp_path / "run", callbacks=[watch], optim=optim, **options)
    assert watch.steps == 6


def test_one_update_is_one_route_with_accumulation(tmp_path, monkeypatch):
    seen = []
    step, training_step = MaskedAdamW.step, RTLTrainer.training_step

    def watched_step(self, closure=None):
        seen.append(("step", sorted(self.routed_model.routes_since_update)))
        return step(self, closure)

    def watched_training_step(self, model, inputs, num_items_in_batch=None):
        seen.append(("batch", inputs["route"], len(inputs["labels"])))
        return training_step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(MaskedAdamW, "step", watched_step)
    monkeypatch.setattr(RTLTrainer, "training_step", watched_training_step)
    made = run(tmp_path / "run", target_sparsity=[0.3], gradient_accumulation_steps=2, num_train_epochs=2)
    assert made.plan().retraining_steps == made.state.global_step == 6
    expected = [[("batch", route, 8), ("batch", route, 8), ("step", [route])] for route in (0, 1, 2)]
    assert seen == list(chain(*expected)) * 2


@pytest.mark.slow
def test_accumulated_batches_weigh_as_one(tmp_path):
    """Without batch norm, two batches of 4 equal one of 8: loss and gradient are means over all samples."""
    columns = DOMAINS
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    results = []
    for size, accumulation in ((4, 2), (8, 1)):
        model = RTLModelForImageClassification.from_backbone(config, route_names=ROUTES, ticket_task="labels", seed=0)
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        made = run(
            tmp_path / str(size),
            model,
            optim="sgd",
            learning_rate=0.1,
            target_sparsity=[0.0],
            route_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            **data,
        )
        assert made.state.global_step == 6
        losses = [entry["loss"] for entry in made.rounds[0]["log_history"] if "loss" in entry]
        results.append((losses, [parameter.detach() for parameter in made.model.parameters()]))
    (losses, parameters), (other_losses, other_parameters) = results
    assert losses == pytest.approx(other_losses, rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(parameters, other_parameters, strict=True))


def test_both_phases_compute_in_bfloat16(tmp_path, monkeypatch):
    computed = set()
    original = nn.Conv2d.forward

    def forward(self, x):
        y = original(self, x)
        computed.add((phase, y.dtype))
        return y

    phase = "extraction"

    class Phase(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            nonlocal phase
            phase = "retraining"

    model = image_model()
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    made = run(tmp_path / "run", model, callbacks=[Phase()], bf16=True, target_sparsity=[0.3])
    assert computed == {("extraction", torch.bfloat16), ("retraining", torch.bfloat16)}
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert np.isfinite(made.rounds[0]["train_loss"])
    total = made.model.mask_bank.num_weights
    assert made.model.mask_bank.count().tolist() == [total - round(0.3 * total)] * 3


@pytest.mark.slow
def test_the_best_checkpoint_of_a_round_is_its_model(tmp_path):
    """A script makes the second evaluation the best in the first round, and the first one in the second."""
    scores = iter([0.7, 0.2, 0.9, 0.1, 0.5, 0.8, 0.3, 0.1, 0.4])  # the first in the rehearsal

    def compute_metrics(prediction):
        assert prediction.predictions.shape == (12, 3)
        assert prediction.label_ids.tolist() == [index % 3 for index in range(12)]
        return {"balanced_accuracy": next(scores)}

    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            backbone = {name: tensor.detach().clone() for name, tensor in model.backbone.named_parameters()}
            kept[metrics["eval_balanced_accuracy"]] = backbone, [row[:3].clone() for row in model.norm_statistics.rows]

    made = run(
        tmp_path / "run",
        callbacks=[Keep()],
        options={"compute_metrics": compute_metrics},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="balanced_accuracy",
    )
    assert next(scores, None) is None
    assert [report["metrics"]["eval_balanced_accuracy"] for report in made.rounds] == [0.5, 0.4]
    for name, best in zip(ROUNDS, (0.9, 0.8), strict=True):
        model = RTLModel.from_pretrained(tmp_path / "run" / name)
        parameters, rows = kept[best]
        assert all(same(model.backbone.get_parameter(key), value) for key, value in parameters.items())
        assert all(same(row[:3], old) for row, old in zip(model.norm_statistics.rows, rows, strict=True))


@pytest.mark.slow
def test_the_best_checkpoint_is_found_by_metrics_of_hf_rtl(tmp_path):
    made = run(
        tmp_path / "run",
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="balanced_accuracy",
    )
    for report in made.rounds:
        history = [entry for entry in report["log_history"] if entry.get("round") == report["round"]]
        values = [entry["eval_balanced_accuracy"] for entry in history if "eval_balanced_accuracy" in entry]
        assert len(values) == 3
        assert report["metrics"]["eval_balanced_accuracy"] == max(values[:2])


def test_several_evaluation_sets(tmp_path):
    sets = {"easy": Images(12, seed=1), "hard": Images(9, seed=2)}
    made = run(tmp_path / "run", evaluate=sets, target_sparsity=[0.3])
    metrics = made.rounds[0]["metrics"]
    for name, data in sets.items():
        alone = made.evaluate(data)
        for key in ("loss", "balanced_accuracy", "bee/auroc"):
            assert metrics[f"eval_{name}_{key}"] == alone[f"eval_{key}"]


def test_a_run_without_evaluation(tmp_path):
    made = RTLTrainer(image_model(), arguments(tmp_path, target_sparsity=[0.3]), train_dataset=Images(24))
    made.train()
    assert made.rounds[0]["metrics"] == {}
    with pytest.raises(ValueError, match="`eval_dataset`"):
        made.evaluate()
