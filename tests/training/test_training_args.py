"""The arguments of a run: defaults, refused values, and their record."""

import json

import pytest
from transformers import HfArgumentParser

from hf_rtl import RTLTrainingArguments
from hf_rtl.training.training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS


def arguments(tmp_path, **values):
    return RTLTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], **values)


def test_defaults_are_the_methods(tmp_path):
    args = arguments(tmp_path)
    assert args.learning_rate == 1e-4
    assert args.lr_scheduler_type == "constant"
    assert args.max_grad_norm == 0.0
    assert args.weight_decay == 0.0
    assert args.num_train_epochs == 10
    assert args.optim == "adamw_torch"
    assert args.logging_nan_inf_filter is False
    assert args.target_sparsity == [0.25, 0.5, 0.75]
    assert (args.prune_schedule, args.prune_amount, args.prune_scope) == ("geometric", 0.2, "global")
    assert (args.rewind_to, args.retrain_every_round, args.allow_disconnected) == (0, True, False)
    assert args.calibration_fraction == 0.0
    assert args.label_names == ["labels"]


def test_a_single_sparsity_is_one_round(tmp_path):
    assert arguments(tmp_path, target_sparsity=0.5).target_sparsity == [0.5]
    assert arguments(tmp_path, target_sparsity=0).target_sparsity == [0.0]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("target_sparsity", 1.0, ValueError, "below 1"),
        ("target_sparsity", -0.1, ValueError, "-0.1"),
        ("target_sparsity", float("nan"), ValueError, "nan"),
        ("target_sparsity", [0.5, 1.5], ValueError, "1.5"),
        ("target_sparsity", [0.5, 0.5], ValueError, "increase"),
        ("target_sparsity", [0.5, 0.25], ValueError, "increase"),
        ("target_sparsity", [], ValueError, "empty"),
        ("target_sparsity", ["0.5"], TypeError, "'0.5'"),
        ("target_sparsity", "0.5", TypeError, "target_spars"),
        ("target_sparsity", None, TypeError, ""),
        ("prune_schedule", "cubic", ValueError, "'geometric', 'linear', 'constant', got 'cubic'"),
        ("prune_scope", "locally", ValueError, "'global', 'layer', 'global_normalised', 'row', got 'locally'"),
        ("prune_criterion", "random", ValueError, "`prune_criterion` must be one of 'magnitude', 'activity', got"),
        ("prune_granularity", "head", ValueError, "`prune_granularity` must be one of 'weight', 'neuron', 'channel'"),
        ("prune_round_to", 0, ValueError, "`prune_round_to` must be at least 1, got 0"),
        ("prune_round_to", 1.5, TypeError, "`prune_round_to` must be an int, got 1.5"),
        ("prune_batches", 0, ValueError, "`prune_batches` must be at least 1, got 0"),
        ("prune_amount", 0.0, ValueError, "amount"),
        ("prune_amount", 1.0, ValueError, "amount"),
        ("prune_amount", 4096, ValueError, "constant"),
        ("prune_amount", "0.2", TypeError, "amount"),
        ("extraction_epochs", 0, ValueError, "`extraction_epochs` must be positive, got 0"),
        ("extraction_epochs", float("nan"), ValueError, "`extraction_epochs`"),
        ("extraction_epochs", float("inf"), ValueError, "`extraction_epochs`"),
        ("extraction_epochs", "2", TypeError, "`extraction_epochs`.*'2'"),
        ("extraction_steps", -1, ValueError, "`extraction_steps` must be at least 0, got -1"),
        ("extraction_steps", 1.5, TypeError, "`extraction_steps`.*1.5, a `float`"),
        ("extraction_steps", True, TypeError, "`extraction_steps`"),
        ("extraction_threads", 0, ValueError, "`extraction_threads`"),
        ("extraction_threads", "2", TypeError, "`extraction_threads`"),
        ("rewind_to", -1, ValueError, "`rewind_to` must be at least 0, got -1"),
        ("rewind_to", 0.5, TypeError, "`rewind_to`"),
        ("rewind_to", None, TypeError, "`rewind_to`"),
        ("route_batch_size", 0, ValueError, "`route_batch_size` must be at least 1, got 0"),
        ("route_batch_size", 8.0, TypeError, "`route_batch_size`"),
        ("recalibration_batches", -1, ValueError, "`recalibration_batches`"),
        ("calibration_fraction", 1.0, ValueError, r"`calibration_fraction` must be in \[0, 1\), got 1.0"),
        ("calibration_fraction", -0.1, ValueError, "`calibration_fraction`"),
        ("calibration_fraction", "0.1", TypeError, "`calibration_fraction`"),
        ("label_smoothing_factor", 0.1, ValueError, "`label_smoothing_factor`"),
        ("bf16_full_eval", True, ValueError, "`bf16_full_eval` = True is not supported: .* cast a saved model"),
        ("fp16_full_eval", True, ValueError, "`fp16_full_eval` = True is not supported: .* cast a saved model"),
        (
            "auto_find_batch_size",
            True,
            ValueError,
            "`auto_find_batch_size` = True is not supported.*`route_batch_size`",
        ),
        ("save_only_model", True, ValueError, "`save_only_model` = True is not supported.*continue"),
        ("ignore_data_skip", True, ValueError, "`ignore_data_skip` = True is not supported"),
        ("per_device_train_batch_size", 16, ValueError, "`per_device_train_batch_size` = 16.*`route_batch_size`"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_written(tmp_path, name, value, error, message):
    with pytest.raises(error, match=message):
        arguments(tmp_path, **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_the_scope_follows_the_granularity_unless_it_is_given(tmp_path):
    units = arguments(tmp_path, prune_granularity="neuron")
    assert (units.prune_scope, units.prune_round_to) == ("layer", 8)
    assert arguments(tmp_path, prune_granularity="channel", prune_scope="global").prune_scope == "global"
    assert arguments(tmp_path, prune_criterion="activity").prune_scope == "global"
    assert arguments(tmp_path, prune_criterion="activity", prune_scope="row").prune_scope == "row"
    for scope in ("row", "global_normalised"):
        with pytest.raises(ValueError, match=f"`prune_scope` = '{scope}' ranks single weights.*'layer' or 'global'"):
            arguments(tmp_path, prune_granularity="neuron", prune_scope=scope)


def test_counts_of_weights_suit_the_constant_schedule(tmp_path):
    assert arguments(tmp_path, prune_schedule="constant", prune_amount=4096).prune_amount == 4096
    with pytest.raises(ValueError, match="amount"):
        arguments(tmp_path, prune_schedule="constant", prune_amount=0.2)


def test_recorded_values_are_plain_and_name_no_folder(tmp_path):
    args = arguments(tmp_path, extraction_dir=str(tmp_path / "shared"), lr_scheduler_type="linear", optim="sgd")
    for names in (EXTRACTION_FIELDS, RETRAINING_FIELDS):
        values = args.select_values(names)
        assert list(values) == names
        text = json.dumps(values)
        assert json.loads(text) == values
        assert str(tmp_path) not in text
    assert args.select_values(["lr_scheduler_type", "optim"]) == {"lr_scheduler_type": "linear", "optim": "sgd"}


def test_what_decides_masks_is_apart_from_what_decides_retraining_only():
    assert not set(EXTRACTION_FIELDS) & set(RETRAINING_FIELDS)
    assert {"learning_rate", "target_sparsity", "route_batch_size", "rewind_to", "seed"} <= set(EXTRACTION_FIELDS)
    assert {"lr_scheduler_type", "max_steps", "gradient_accumulation_steps"} <= set(RETRAINING_FIELDS)


def test_from_a_command_line(tmp_path):
    words = (
        f"--output_dir {tmp_path} --target_sparsity 0.3 0.6 --extraction_steps 5 --use_cpu --retrain_every_round no"
    )
    (args,) = HfArgumentParser(RTLTrainingArguments).parse_args_into_dataclasses(words.split())
    assert args.target_sparsity == [0.3, 0.6]
    assert args.extraction_steps == 5
    assert args.retrain_every_round is False
