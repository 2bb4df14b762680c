"""Retraining masks that are given, and data without `datasets`."""

import copy
import json
import shutil
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from hf_rtl import RTLTrainer
from tests.child_processes import run_program
from tests.training.small_runs import ROUNDS, ROUTES, files, make_trainer, run, same


@pytest.mark.slow
def test_retraining_given_masks(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    made = make_trainer(folder)
    made.train()
    tickets = [made.model.mask_bank[route] for route in ROUTES]
    before = files(folder)
    # The masks of the tickets give the same round.
    report = made.retrain(tickets, like=ROUNDS[1], name="copy")
    copied = load_file(folder / "copy" / "model.safetensors")
    expected = load_file(folder / ROUNDS[1] / "model.safetensors")
    assert all(same(copied[name], tensor) for name, tensor in expected.items())
    assert report["mask_fingerprint"] == made.rounds[1]["mask_fingerprint"]
    assert len(made.rounds) == 2
    # Other masks give another model.
    shifted = tickets[1:] + tickets[:1]
    report = made.retrain(shifted, like=ROUNDS[1], name="shifted")
    assert report["mask_fingerprint"] == made.model.mask_bank.fingerprint() != made.rounds[1]["mask_fingerprint"]
    assert report["folder"] == "shifted"
    assert json.loads((folder / "shifted" / "round.json").read_text()) == report
    # The result is read back, and not confused with that of other masks.
    assert made.retrain(shifted, like=ROUNDS[1], name="shifted") == report
    for name in ("copy", ROUNDS[1]):
        with pytest.raises(ValueError, match="other masks"):
            made.retrain(shifted, like=ROUNDS[1], name=name)
    with pytest.raises(ValueError, match="'round-9' is no round"):
        made.retrain(tickets, like="round-9", name="x")
    after = files(folder)
    assert {path: after[path] for path in before} == before


@pytest.mark.slow
def test_the_batches_of_a_round_can_be_repeated(tmp_path, monkeypatch):
    trained = []
    training_step = RTLTrainer.training_step

    def watched(self, model, inputs, num_items_in_batch=None):
        trained.append(copy.copy(inputs))
        return training_step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(RTLTrainer, "training_step", watched)
    made = run(tmp_path / "run", num_train_epochs=2)
    for index in range(2):
        again = list(made.retraining_batches(index))
        batches = trained[index * 12 : (index + 1) * 12]
        assert [batch["route"] for batch in again] == [batch["route"] for batch in batches]
        for one, other in zip(again, batches, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])


@pytest.mark.long
@pytest.mark.slow
def test_plain_tensors_need_no_datasets(tmp_path):
    """In a process of its own: here datasets is imported already."""
    program = """
        import sys

        class Hide:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.split(".")[0] == "datasets" else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
        try:
            import datasets
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("datasets is there")
        import torch
        import hf_rtl
        import hf_rtl.training.trainer
        from hf_rtl.data.partition_by import partition_by_column

        assert partition_by_column([{"r": 0}, {"r": 0}], "r").counts.tolist() == [2]
        torch.set_num_threads(1)
        samples = [{"pixel_values": torch.randn(3, 16, 16), "label": index % 2} for index in range(16)]
        model = hf_rtl.RTLModelForImageClassification.from_backbone(
            "test_resnet", route_names=["a", "b"], ticket_task="membership", seed=0
        )
        args = hf_rtl.RTLTrainingArguments(
            output_dir=sys.argv[1], target_sparsity=[0.3], extraction_steps=1, max_steps=2, route_batch_size=8,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", calibration_fraction=0.25,
        )
        trainer = hf_rtl.RTLTrainer(model, args, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        assert "datasets" not in sys.modules
        print("kept", trainer.rounds[0]["kept"]["a"])
    """
    assert "kept" in run_program(textwrap.dedent(program), tmp_path / "run").stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
