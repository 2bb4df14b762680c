"""Thresholds of decisions, calibrated on samples that are held out of training."""

from itertools import chain

import datasets
import numpy as np
import pytest
import torch

from hf_rtl import RTLModelForImageClassification, RTLTrainer
from hf_rtl.metrics import calibrate_thresholds
from tests.training.small_runs import ROUNDS, ROUTES, Images, Recorder, make_trainer, run


@pytest.mark.slow
def test_samples_held_out_for_calibration_are_not_trained_on(tmp_path, monkeypatch):
    data = Images(36)
    made = make_trainer(tmp_path / "run", train=data, calibration_fraction=0.25, seed=1)
    held_out = sorted(made.run_data.calibration_dataset.indices)
    assert 0 not in held_out  # that sample is looked at for its columns
    assert [index % 3 for index in held_out].count(0) == [index % 3 for index in held_out].count(2) == 3
    assert len(held_out) == 9
    monkeypatch.setattr(RTLTrainer, "calibrated_thresholds", lambda self: None)
    for name in ("rehearse", "check_columns"):  # which try some of them
        monkeypatch.setattr(f"hf_rtl.training.rounds.{name}", lambda *_: None)
    data.fetched.clear()
    made.train()
    assert set(data.fetched) == set(range(36)) - set(held_out)
    assert made.plan().route_sizes == dict.fromkeys(ROUTES, 9)


@pytest.mark.slow
def test_thresholds_are_calibrated_in_every_round_stored_and_loaded(tmp_path):
    values = {"train": Images(36), "calibration_fraction": 0.25, "per_device_eval_batch_size": 8}
    made = run(tmp_path / "run", **values)
    assert made.rounds[0]["thresholds"] != made.rounds[1]["thresholds"]
    for name, report in zip(ROUNDS, made.rounds, strict=True):
        model = RTLModelForImageClassification.from_pretrained(tmp_path / "run" / name)
        assert model.config.thresholds == report["thresholds"]
        pixels = torch.stack([made.run_data.calibration_dataset[index]["pixel_values"] for index in range(9)])
        homes = np.array([made.run_data.calibration_dataset[index]["label"] for index in range(9)])
        with torch.no_grad():
            scores = torch.cat([model(pixel_values=part).logits for part in pixels.split(8)])
        assert model.config.thresholds == calibrate_thresholds(scores.numpy(), homes)
        assert "eval_calibrated_balanced_accuracy" in report["metrics"]
        again = make_trainer(tmp_path / "unused", model, **values).evaluate()
        assert again["eval_calibrated_f1"] == report["metrics"]["eval_calibrated_f1"]
    reread = make_trainer(tmp_path / "run", **values)
    reread.train()
    assert reread.model.config.thresholds == made.rounds[-1]["thresholds"]


@pytest.mark.slow
def test_thresholds_of_one_round_are_not_those_of_the_next(tmp_path):
    class Watch(Recorder):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            assert model.config.thresholds is None
            self.calls["train_begin"] += 1

    watch = Watch()
    run(tmp_path / "run", callbacks=[watch], train=Images(36), calibration_fraction=0.25)
    assert watch.calls["train_begin"] == 2


def test_a_calibration_set_of_its_own(tmp_path):
    calibration = Images(9, seed=5)
    made = run(tmp_path / "run", target_sparsity=[0.3], options={"calibration_dataset": calibration})
    assert len(made.rounds[0]["thresholds"]) == 3
    assert len(made.run_data.training.dataset) == 24
    with pytest.raises(ValueError, match="`calibration_dataset` and `calibration_fraction`"):
        make_trainer(tmp_path / "b", calibration_fraction=0.2, options={"calibration_dataset": calibration})


@pytest.mark.slow
def test_held_out_samples_keep_their_route_where_classes_are_ordered_otherwise(tmp_path):
    """Classes match routes by name, so that the number of a class may differ from its route's."""
    classes = ["cat", "ant", "bee"]
    source = Images(36)
    data = datasets.Dataset.from_dict(
        {
            "pixel_values": [sample["pixel_values"].tolist() for sample in source.samples],
            "label": [classes.index(ROUTES[sample["label"]]) for sample in source.samples],
        },
        features=datasets.Features(
            {
                "pixel_values": datasets.Array3D((3, 16, 16), "float32"),
                "label": datasets.ClassLabel(names=classes),
            }
        ),
    ).with_format("torch")
    results = []
    for train in (source, data):
        made = make_trainer(
            tmp_path / str(len(results)), train=train, calibration_fraction=0.25, target_sparsity=[0.3]
        )
        loader = made.get_eval_dataloader(made.run_data.calibration_dataset)
        labels = list(chain(*(batch["labels"].tolist() for batch in loader)))
        assert labels == [index % 3 for index in made.run_data.calibration_dataset.indices]
        made.train()
        results.append(made.rounds[0]["thresholds"])
    assert results[0] == results[1]


def test_a_calibration_dataset_without_samples_of_a_route_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="'cat'"):
        make_trainer(tmp_path / "run", options={"calibration_dataset": Images(8, num_routes=2)})
    assert not (tmp_path / "run").exists()
