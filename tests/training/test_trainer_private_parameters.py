"""Runs whose tickets have private parameters."""

import pytest
import torch
from transformers import TrainerCallback

from hf_rtl import RTLModel
from hf_rtl.modeling.files import read_tensors
from tests.training.interruptions import interrupt
from tests.training.small_runs import Images, bits, contents, image_model, make_trainer, masks_on_disk, run, same


PRIVATE = ["*bn*", "*.fc.*"]
NAMES = [f"timm_model.bn{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")]
NAMES += ["timm_model.fc.weight", "timm_model.fc.bias"]


def private_model(**values):
    return image_model(private_parameters=PRIVATE, **values)


class WatchRows(TrainerCallback):
    """Keeps the rows that every joint retraining starts from, and checks what each of its steps moves."""

    def __init__(self):
        self.starts, self.routes = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.starts.append([rows.detach().clone() for rows in model.private_parameters.rows])

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        (self.route,) = model.routes_since_update
        self.before = [bits(rows).view(3, -1).clone() for rows in model.private_parameters.rows]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for rows, before in zip(model.private_parameters.rows, self.before, strict=True):
            changed = (bits(rows).view(3, -1) != before).any(1).tolist()
            assert changed == [route == self.route for route in range(3)]
        self.routes.append(self.route)


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("private") / "run", WatchRows()
    made = run(folder, private_model(), callbacks=[watch], save_strategy="steps", save_steps=2)
    return folder, made, watch


@pytest.mark.slow
def test_a_run_with_private_parameters(private_run):
    folder, made, watch = private_run
    assert made.model.private_parameters.names == NAMES
    assert len(watch.routes) == 12 and set(watch.routes) == {0, 1, 2}
    theta0 = read_tensors(folder / "theta0.safetensors")
    assert len(watch.starts) == 2
    for start in watch.starts:
        assert all(same(row, theta0[name]) for name, rows in zip(NAMES, start, strict=True) for row in rows)
    for name, rows in zip(NAMES, made.model.private_parameters.rows, strict=True):
        assert not torch.equal(rows[0], rows[1])
        assert same(made.model.backbone.get_parameter(name), theta0[name])
    loaded = RTLModel.from_pretrained(folder / "final").eval()
    images = torch.stack([Images(2)[index]["pixel_values"] for index in range(2)])
    for route in (0, 1, 2, -1):
        answer = made.model.eval()(pixel_values=images, route_ids=route).logits
        assert torch.equal(loaded(pixel_values=images, route_ids=route).logits, answer)
        assert torch.equal(made.model.extract_ticket(route)(images).logits, answer)


@pytest.mark.slow
def test_extraction_trains_private_parameters_as_if_they_were_shared(finished, private_run):
    """So runs that differ only in private parameters find the same masks, and can share them."""
    ours, theirs = (masks_on_disk(folder, finished.trainer.model) for folder in (private_run[0], finished.folder))
    assert ours.keys() == theirs.keys() and len(ours) > 5
    assert all(torch.equal(*pair) for key in ours for pair in zip(ours[key], theirs[key], strict=True))
    states = [contents(folder)["final/model.safetensors"] for folder in (private_run[0], finished.folder)]
    assert states[0] != states[1]


def test_frozen_private_parameters_are_not_trained_in_either_phase(tmp_path):
    backbone = image_model().backbone
    backbone.timm_model.fc.bias.requires_grad_(False)
    options = {"route_names": ["ant", "bee", "cat"], "ticket_task": "membership", "private_parameters": PRIVATE}
    model = type(image_model()).from_backbone(backbone, **options)
    made = make_trainer(tmp_path / "run", model, target_sparsity=[0.3])
    network = made.ticket_trainer(dict(backbone.state_dict())).network
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["timm_model.fc.bias"]
    made.train()
    rows = model.private_parameters.rows[-1]
    assert all(same(row, backbone.timm_model.fc.bias) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("place", [("step", 9), ("evaluation", 1)])
def test_an_interrupted_run_ends_as_one_that_was_not(private_run, tmp_path, monkeypatch, place):
    options = {"save_strategy": "steps", "save_steps": 2}
    interrupt(monkeypatch, tmp_path / "run", place, model=private_model(), **options)
    run(tmp_path / "run", private_model(), **options)
    assert contents(tmp_path / "run") == contents(private_run[0])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused", "rmsprop"])
def test_private_rows_with_every_optimizer(tmp_path, optim):
    options = {"weight_decay": 0.1, "max_grad_norm": 1.0, "learning_rate": 0.01, "gradient_accumulation_steps": 2}
    options["seed"] = 1  # with which no gradient of a row is exactly zero in bfloat16
    watch = WatchRows()
    run(tmp_path, private_model(), callbacks=[watch], optim=optim, target_sparsity=[0.3], bf16=True, **options)
    assert len(watch.routes) == 3


def test_private_rows_have_the_weight_decay_of_their_parameter(tmp_path):
    made = make_trainer(tmp_path, private_model(), weight_decay=0.1)
    decayed, others = made.parameter_groups(made.model)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    rows = dict(zip(NAMES, made.model.private_parameters.rows, strict=True))
    shared = image_model()
    expected = make_trainer(tmp_path, shared).parameter_groups(shared)[0]["params"]
    expected = {name for name in NAMES if any(p is shared.backbone.get_parameter(name) for p in expected)}
    assert {name for name, p in rows.items() if any(p is one for one in decayed["params"])} == expected
    assert expected and len(expected) < len(NAMES)
    listed = [*decayed["params"], *others["params"]]
    assert len(listed) == len(set(map(id, listed))) == sum(p.requires_grad for p in made.model.parameters())


@pytest.mark.slow
def test_the_union_is_recalibrated_with_the_mean_of_all_rows(private_run):
    """Recalibration ran through the mean of the rows."""
    _, made, _ = private_run
    seen = []
    hook = made.model.backbone.timm_model.bn1.register_forward_pre_hook(
        lambda module, _: seen.append((module.weight.detach().clone(), module.momentum))
    )
    with made.in_round(made.plan().rounds[-1], num_steps_before=0):
        made.recalibrate()
    hook.remove()
    rows = made.model.private_parameters.rows[NAMES.index("timm_model.bn1.weight")]
    union = seen[-3:]
    assert [momentum for _, momentum in union] == [1, 1 / 2, 1 / 3]
    assert all(torch.allclose(weight, rows.mean(0)) for weight, _ in union)
