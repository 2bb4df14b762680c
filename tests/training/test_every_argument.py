"""
Every argument of `TrainingArguments` and of `Trainer` works in both phases, or in one as the reference says, or is
refused. A field that a newer transformers adds is missing here, and has to be looked at.
"""

import inspect
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_pt_utils import EvalLoopContainer

from hf_rtl import RTLModelForSequenceClassification, RTLTrainer
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.training.extraction import Extraction
from hf_rtl.training.ticket_trainer import named_state
from tests.modeling.small_backbones import units_found_once
from tests.training.small_runs import arguments, make_trainer


REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "arguments.md"
BERT = BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20, num_labels=2
)
DATA = [{"input_ids": [1 + i % 7, 2, 3 + i % 5], "label": i % 2, "domain": i // 2 % 2, "extra": i} for i in range(12)]


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


class Phases:
    """Two steps of one ticket's training, four of joint retraining, and one evaluation."""

    def __init__(self, folder, options=None, trainer=RTLTrainer, **values):
        given = {"max_steps": 4, "route_batch_size": 4, "route_column": "domain", "target_sparsity": [0.5], **values}
        model = RTLModelForSequenceClassification.from_backbone(
            BERT, route_names=["day", "night"], ticket_task="labels", seed=0
        )
        self.forwards = []
        model.backbone.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: self.forwards.append(1))
        self.folder = folder
        self.trainer = made = trainer(
            model, arguments(folder, **given), train_dataset=DATA, eval_dataset=DATA, **(options or {})
        )
        theta0 = {name: tensor.detach().clone() for name, tensor in named_state(model.backbone)}
        ticket = made.ticket_trainer(theta0)
        ticket.train(None, made.extraction_batches(0, 0), seed=(0,))
        self.extraction = hash_tensors(dict(named_state(ticket.network))), len(self.forwards)
        with made.in_round(made.plan().rounds[0], num_steps_before=0):
            made.retrain_jointly(folder)
        self.retraining = hash_tensors(dict(named_state(model.backbone))), made.state.global_step
        self.history = made.state.log_history
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)

    @property
    def evaluations(self):
        return [entry["step"] for entry in self.history if "eval_loss" in entry]

    @property
    def checkpoints(self):
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Runs the phases with the given arguments, only once for the same ones."""
    known = {}

    def run(**values):
        key = repr(sorted(values.items()))
        if key not in known:
            known[key] = Phases(tmp_path_factory.mktemp("phases"), **values)
        return known[key]

    return run


# The weights that come out of both phases differ from those with the values on the right.
BOTH = {
    "learning_rate": ({"learning_rate": 0.1}, {}),
    "optim": ({"optim": "sgd"}, {}),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "sgd"}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "adam_beta1": ({"adam_beta1": 0.5}, {}),
    "adam_beta2": ({"adam_beta2": 0.5}, {}),
    "adam_epsilon": ({"adam_epsilon": 0.1}, {}),
    "max_grad_norm": ({"max_grad_norm": 0.01, "optim": "sgd"}, {"optim": "sgd"}),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, {}),
    "bf16": ({"bf16": True}, {}),
    "seed": ({"seed": 1}, {}),
    "data_seed": ({"data_seed": 1}, {}),
}
# Those of joint retraining differ alone.
RETRAINING = {
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 2}, {"max_steps": -1, "num_train_epochs": 1}),
    "max_steps": ({"max_steps": 3}, {}),
    "lr_scheduler_type": ({"lr_scheduler_type": "linear"}, {}),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-4}},
    ),
    "warmup_steps": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {"lr_scheduler_type": "constant_with_warmup"},
    ),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {}),
}
# What an observer of joint retraining sees differs, and the weights are the same.
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
OBSERVED = {
    "logging_strategy": ({"logging_strategy": "no"}, {}, lambda p: len(p.history)),
    "logging_steps": ({"logging_steps": 2}, {}, lambda p: len(p.history)),
    "logging_first_step": (
        {"logging_steps": 4, "logging_first_step": True},
        {"logging_steps": 4},
        lambda p: len(p.history),
    ),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "all"},
        {},
        lambda p: p.trainer.state.num_input_tokens_seen,
    ),
    "disable_tqdm": ({"disable_tqdm": False}, {}, lambda p: p.trainer.progress.show),
    "eval_strategy": ({"eval_strategy": "epoch"}, {}, lambda p: p.evaluations),
    "eval_steps": ({**STEPS, "eval_steps": 2}, STEPS, lambda p: p.evaluations),
    "eval_delay": ({**STEPS, "eval_delay": 3}, STEPS, lambda p: p.evaluations),
    "eval_on_start": ({"eval_on_start": True}, {}, lambda p: p.evaluations),
    "save_strategy": ({"save_strategy": "epoch"}, {}, lambda p: p.checkpoints),
    "save_steps": (
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2},
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
        lambda p: p.checkpoints,
    ),
    "save_total_limit": (
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
        {"save_strategy": "steps", "save_steps": 1},
        lambda p: p.checkpoints,
    ),
    "skip_memory_metrics": ({"skip_memory_metrics": False}, {}, lambda p: len(p.history[-1])),
    "full_determinism": ({"full_determinism": True}, {}, lambda p: p.deterministic),
    "use_cache": ({"use_cache": True}, {}, lambda p: p.trainer.model.config.use_cache),
}


# The mask of a prune event differs.
NEURONS, ACTIVITY = {"prune_granularity": "neuron"}, {"prune_criterion": "activity", "prune_scope": "row"}
MASKS = {
    "prune_criterion": (ACTIVITY, {"prune_scope": "row"}),
    "prune_granularity": ({**NEURONS, "prune_round_to": 1}, {}),
    "prune_scope": ({"prune_scope": "row"}, {}),
    "prune_round_to": ({**NEURONS, "prune_round_to": 2}, {**NEURONS, "prune_round_to": 8}),
    "prune_batches": ({**ACTIVITY, "prune_batches": 1}, ACTIVITY),
    "extraction_steps": ({"extraction_steps": 0}, {}),
}


def find_mask(folder, **values):
    """The packed mask that one prune event leaves of all ones."""
    model = RTLModelForSequenceClassification.from_backbone(
        BERT, route_names=["day", "night"], ticket_task="labels", seed=0
    )
    given = {"route_batch_size": 4, "route_column": "domain", "target_sparsity": [0.5], "prune_amount": 0.5, **values}
    made = RTLTrainer(model, arguments(folder, **given), train_dataset=DATA)
    theta0 = {name: tensor.detach().clone() for name, tensor in named_state(model.backbone)}
    extraction, bank = Extraction(made, made.run_directory, None, theta0, []), model.mask_bank
    ones = bank.pack([torch.ones(shape, dtype=torch.bool) for shape in bank.shapes])
    return extraction.train_and_prune(0, 0, ones, made.plan().rounds[0].kept[0], lambda: None)[0]


@pytest.mark.parametrize("name", MASKS)
def test_masks_follow(tmp_path, name):
    changed, base = (find_mask(tmp_path / str(number), **values) for number, values in enumerate(MASKS[name]))
    assert not all(map(torch.equal, changed, base))


@pytest.mark.parametrize("name", BOTH)
def test_both_phases_follow(phases, name):
    changed, base = (phases(**values) for values in BOTH[name])
    assert changed.extraction != base.extraction
    assert changed.retraining != base.retraining


@pytest.mark.parametrize("name", RETRAINING)
def test_joint_retraining_alone_follows(phases, name):
    changed, base = (phases(**values) for values in RETRAINING[name])
    assert changed.extraction == base.extraction
    assert changed.retraining != base.retraining


@pytest.mark.parametrize("name", OBSERVED)
def test_joint_retraining_shows(phases, name):
    changed, base = (phases(**values) for values in OBSERVED[name][:2])
    seen = OBSERVED[name][2]
    assert seen(changed) != seen(base)
    assert (changed.extraction, changed.retraining) == (base.extraction, base.retraining)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_phases_recompute(phases, name):
    if name not in {field.name for field in fields(TrainingArguments)}:
        pytest.skip("this transformers has the older name only")
    plain, recomputing = phases(), phases(**{name: True})
    assert recomputing.extraction == (plain.extraction[0], 2 * plain.extraction[1])
    assert recomputing.retraining == plain.retraining
    assert len(recomputing.forwards) == 2 * len(plain.forwards)


def test_both_phases_recompute_as_asked(phases, monkeypatch):
    reentrant = []
    original = torch.utils.checkpoint.CheckpointFunction.apply

    def apply(*given):
        reentrant.append(1)
        return original(*given)

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "apply", apply)
    made = phases(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert len(reentrant) == 2 + 4
    assert made.extraction[0] == phases().extraction[0] and made.retraining == phases().retraining


def test_loaders_of_both_phases_and_of_evaluation(tmp_path):
    values = {
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "forkserver",
        "per_device_eval_batch_size": 5,
        "data_seed": 4,
    }
    made = RTLTrainer(
        RTLModelForSequenceClassification.from_backbone(BERT, route_names=["all"], ticket_task="labels", seed=0),
        arguments(tmp_path, **values),
        train_dataset=DATA,
        eval_dataset=DATA,
    )
    data = made.run_data.training
    extraction = data.loader(data.sampler(()), made.collate(), **made.loaders.arguments())
    with made.in_round(made.plan().rounds[0], num_steps_before=0):
        retraining = made.get_train_dataloader()
    evaluation = made.get_eval_dataloader()
    for loader in (extraction, retraining, evaluation):
        assert loader.num_workers == 2 and loader.prefetch_factor == 3
        assert loader.multiprocessing_context.get_start_method() == "forkserver"
    assert len(evaluation) == 3


def test_unused_columns_of_both_phases_and_of_evaluation(tmp_path):
    seen = []

    def collate(samples):
        seen.append(set(samples[0]))
        return default_data_collator([{key: value for key, value in s.items() if key != "extra"} for s in samples])

    Phases(tmp_path, {"data_collator": collate}, eval_strategy="epoch")
    assert all("extra" not in names for names in seen) and len(seen) > 6
    seen.clear()
    Phases(tmp_path / "kept", {"data_collator": collate}, eval_strategy="epoch", remove_unused_columns=False)
    assert all("extra" in names for names in seen) and len(seen) > 6


def test_evaluation_follows(tmp_path, monkeypatch):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"seen": len(seen)}

    made = partial(Phases, options={"compute_metrics": compute_metrics}, per_device_eval_batch_size=5)
    trainer = made(tmp_path, include_for_metrics=["inputs", "loss"], eval_do_concat_batches=False).trainer
    assert trainer.evaluate()["eval_seen"] == 1
    assert [len(part) for part in seen[0].predictions] == [len(part) for part in seen[0].inputs] == [5, 5, 2]
    assert seen[0].losses is not None
    trainer.args.prediction_loss_only = True
    assert "eval_seen" not in trainer.evaluate()
    trainer.args.prediction_loss_only = False
    moved = []
    original = EvalLoopContainer.to_cpu_and_numpy
    monkeypatch.setattr(EvalLoopContainer, "to_cpu_and_numpy", lambda self: moved.append(original(self)))
    trainer.evaluate()
    without = len(moved)
    trainer.args.eval_accumulation_steps = 2
    trainer.evaluate()
    assert len(moved) > 2 * without


def test_own_functions_and_optimizers_of_both_phases(phases, tmp_path):
    """Each as a keyword of the trainer; joint retraining of two accumulated batches gets the number of both."""
    called = []

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        called.append((tuple(outputs.logits.shape), tuple(labels.shape), int(num_items_in_batch)))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    own = Phases(tmp_path / "loss", {"compute_loss_func": compute_loss_func}, gradient_accumulation_steps=2)
    assert called == [((4, 2), (4,), 4)] * 2 + [((4, 2), (4,), 8)] * 8
    plain = phases(gradient_accumulation_steps=2)
    assert own.extraction == plain.extraction
    losses = [[entry["loss"] for entry in made.history if "loss" in entry] for made in (own, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "dampening": 0.5, "momentum": 0.9})}
    sgd = Phases(tmp_path / "sgd", given)
    assert sgd.extraction != plain.extraction
    assert isinstance(sgd.trainer.optimizer.optimizer, torch.optim.SGD)
    adamw = Phases(tmp_path / "adamw", {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"amsgrad": True, "lr": 0.1})})
    assert isinstance(adamw.trainer.optimizer.optimizer, torch.optim.AdamW)  # the masked one has no `amsgrad`


def test_what_data_parallelism_gets(tmp_path):
    values = {
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 3,
        "ddp_broadcast_buffers": True,
        "ddp_static_graph": True,
    }
    model = RTLModelForSequenceClassification.from_backbone(BERT, route_names=["all"], ticket_task="labels", seed=0)
    handler = RTLTrainer(model, arguments(tmp_path, **values)).accelerator.ddp_handler
    assert all(getattr(handler, name.removeprefix("ddp_")) == value for name, value in values.items())


def test_joint_retraining_calls_what_extraction_does_not(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: called.append("cleared"))
    monkeypatch.setattr(transformers.trainer, "DebugUnderflowOverflow", lambda model: called.append(type(model)))
    Phases(tmp_path, torch_empty_cache_steps=2, debug="underflow_overflow")
    assert called == [RTLModelForSequenceClassification, "cleared", "cleared"]


def test_only_joint_retraining_averages_over_processes(tmp_path, monkeypatch):
    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() / num_items_in_batch

    made = Phases(tmp_path, {"compute_loss_func": compute_loss_func}).trainer
    monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self: 2))
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    joint, alone = [], []
    for average in (True, False):
        made.args.average_tokens_across_devices = average
        with made.model.eval().route_context(0):
            joint.append(made.compute_loss(made.model, dict(inputs), num_items_in_batch=2).item())
        alone.append(made.ticket_loss(made.model.backbone, dict(inputs)).item())
    assert joint[0] == 2 * joint[1]
    assert alone[0] == alone[1] == joint[1]


REFUSED = {
    "per_device_train_batch_size": 16,
    "label_smoothing_factor": 0.1,
    "auto_find_batch_size": True,
    "save_only_model": True,
    "save_on_each_node": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "ignore_data_skip": True,
    "enable_jit_checkpoint": True,
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "optim_target_modules": "all-linear",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
}
# Combinations that would not do what is asked for, with a part of the reason.
REFUSED_TOGETHER = [
    ({"dataloader_persistent_workers": True}, "`dataloader_persistent_workers` needs workers"),
    ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches`.*every process reads its own part"),
    ({"warmup_steps": 10}, "`warmup_steps` = 10 has no effect on `lr_scheduler_type` = 'constant'"),
    ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "'min_lr', which `lr_scheduler_type` = 'constant' lacks"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_kwargs` = {} do not suit.*min_lr"),
    (
        {"competing_epochs": 1, "activation_checkpointing": True, "max_steps": -1, "num_train_epochs": 2},
        "`competing_epochs` needs the masks of all routes at once",
    ),
]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` = .* is not supported: "):
        arguments(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize(("values", "message"), REFUSED_TOGETHER)
def test_refused_together(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


class ScheduleFree(torch.optim.SGD):
    """Has other weights in training than in evaluation."""

    def train(self):
        """Would put the weights of training in place."""


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"optim_args": "momentum=0.9"}, {}, "'momentum=0.9', which has no effect on `optim` = 'adamw_torch'"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, foo=1"}, {}, "'foo=1', which has no effect on `optim` = 'sgd'"),
        (
            {"optim": "sgd", "optim_args": "weight_decay=1"},
            {},
            "has a `weight_decay`, which the argument of that name",
        ),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": []})}, "parameter groups of its own"),
        ({}, {"optimizer_cls_and_kwargs": (lambda: None, {})}, "parameter groups of its own"),
        ({}, {"optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 1})}, "other weights in training than in evaluation"),
        (
            {},
            {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
            "`compute_metrics` of yours",
        ),
        ({"batch_eval_metrics": True}, {}, "`batch_eval_metrics` needs `compute_metrics` of yours: .*whole data set"),
        ({"label_names": ["label"]}, {}, "`label_names` needs `compute_metrics` of yours"),
        ({}, {"model_init": lambda: None}, "`model_init` is not supported"),
        ({}, {"optimizers": (object(), None)}, "`optimizers` is not supported"),
    ],
)
def test_refused_by_the_trainer(tmp_path, values, options, message):
    with pytest.raises(ValueError, match=message):
        Phases(tmp_path / "run", options, **values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "gradient_checkpointing"])
def test_backbones_that_cannot_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}`.*backbone"):
        make_trainer(tmp_path / "run", **{name: True})
    assert not (tmp_path / "run").exists()


# Read by transformers alone, before both phases, in evaluation or at the end; nothing here stands between.
PASSED_ON = """
    output_dir fp16 tf32 use_cpu local_rank ddp_backend ddp_timeout accelerator_config fsdp_config
    dataloader_pin_memory label_names batch_eval_metrics eval_use_gather_object logging_nan_inf_filter
    log_on_each_node log_level log_level_replica report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision
"""
# Arguments of joint retraining alone, or of scripts, with tests elsewhere.
ELSEWHERE = """
    torch_compile torch_compile_backend torch_compile_mode load_best_model_at_end metric_for_best_model
    greater_is_better restore_callback_states_from_checkpoint do_train do_eval do_predict resume_from_checkpoint fsdp
    deepspeed parallelism_config
"""
# By a test above that names them.
TESTED = """
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    dataloader_num_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_persistent_workers
    per_device_eval_batch_size remove_unused_columns include_for_metrics eval_do_concat_batches prediction_loss_only
    eval_accumulation_steps torch_empty_cache_steps debug average_tokens_across_devices ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
"""
KEYWORDS = """
    self model args train_dataset eval_dataset data_collator compute_metrics compute_loss_func optimizer_cls_and_kwargs
    preprocess_logits_for_metrics model_init optimizers callbacks processing_class
"""


def test_no_argument_is_missing_here():
    known = {*BOTH, *RETRAINING, *OBSERVED, *REFUSED}
    known |= {*PASSED_ON.split(), *ELSEWHERE.split(), *TESTED.split()}
    assert {field.name for field in fields(TrainingArguments)} <= known
    assert set(inspect.signature(Trainer.__init__).parameters) == set(KEYWORDS.split())


def test_the_reference_says_what_does_not_hold_for_both_phases():
    said = set(re.findall(r"`(\w+)(?:=\w+)?`", REFERENCE.read_text()))
    observed = {*OBSERVED} - {"disable_tqdm", "use_cache", "full_determinism"}
    alone = {"torch_empty_cache_steps", "debug", "average_tokens_across_devices", *ELSEWHERE.split()}
    assert {*RETRAINING, *observed, *REFUSED, *alone} - said == set()
