"""Losses of the user: the same form in extraction, joint retraining and evaluation."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_rtl import RTLTrainer
from tests.training.small_runs import Images, arguments, image_model


WEIGHT = 3.0


def own_trainer(folder, seen):
    """By a function, and by a class that overrides the method."""

    def weighted(outputs, labels, num_items_in_batch=None):
        seen.append((tuple(outputs.logits.shape), tuple(labels.shape), labels.dtype, int(labels.sum())))
        return binary_cross_entropy_with_logits(outputs.logits, labels, pos_weight=torch.tensor(WEIGHT))

    class Overriding(RTLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = weighted(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    def make(kind, **values):
        given = {"target_sparsity": [0.3], "max_steps": 6, "per_device_eval_batch_size": 12, **values}
        trainer, options = (Overriding, {}) if kind == "method" else (RTLTrainer, {"compute_loss_func": weighted})
        args = arguments(folder, **given)
        return trainer(image_model(), args, train_dataset=Images(24), eval_dataset=Images(12, seed=1), **options)

    return make


@pytest.mark.parametrize("kind", ["function", "method"])
def test_the_loss_of_a_membership_ticket(tmp_path, kind):
    seen = []
    made = own_trainer(tmp_path, seen)(kind)
    metrics = made.train().metrics
    del seen[:3]  # the rehearsal asks every ticket about six samples
    # Per ticket one prune event of two steps; then six steps of joint retraining; losses of training have 4 positives.
    trained = [(8, 1), (8, 1), torch.float32, 4]
    assert seen[:12] == [tuple(trained)] * 12
    assert seen[-3:] == [((12, 1), (12, 1), torch.float32, 4)] * 3
    output = made.predict(Images(12, seed=1))
    scores, is_home = output.predictions.astype(np.float64), np.eye(3)[output.label_ids]
    expected = np.mean(WEIGHT * is_home * np.logaddexp(0, -scores) + (1 - is_home) * np.logaddexp(0, scores))
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_accuracy"] == np.mean(scores.argmax(axis=1) == output.label_ids)


@pytest.mark.parametrize("kind", ["function", "method"])
def test_competition_has_a_loss_of_its_own(tmp_path, kind):
    with pytest.raises(ValueError, match="`competing_epochs` has a loss of its own"):
        own_trainer(tmp_path / "run", [])(kind, competing_epochs=1, num_train_epochs=2, max_steps=-1)
    assert not (tmp_path / "run").exists()
