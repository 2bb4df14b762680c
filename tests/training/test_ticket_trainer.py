"""Training one ticket: its start, its pruning, and its independence of other trainings and of generators."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_rtl.pruning import prune
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state


class Toy(nn.Module):
    """2 inputs, then 2 and 3 units. The prunable weights have the values 0 to 9, to check results by hand."""

    def __init__(self, dropout=0.0, norm=True):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("offset", torch.tensor([0.5]), persistent=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.arange(4.0).view(2, 2))
            self.second.weight.copy_(torch.arange(4.0, 10.0).view(3, 2))
            for bias in (self.first.bias, self.second.bias, self.head.bias):
                bias.fill_(0.25)
            self.head.weight.copy_(torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.25, 0.5]]))

    def forward(self, x, labels=None, return_dict=True):
        x = self.second(self.drop(torch.tanh(self.norm(self.first(x))))) + self.offset
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


NAMES = ["first.weight", "second.weight"]
FULL = [torch.ones(2, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)]
MASKS = [torch.tensor([[True, False], [True, True]]), torch.tensor([[False, True], [True, True], [True, False]])]

OPTIMIZERS = {
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda network: torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda network: torch.optim.RMSprop(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
}


def batches(number, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        x = torch.randn(size, 2, generator=generator)
        yield {"x": x, "labels": (x.sum(1) > 0).long()}


def ticket_trainer(network=None, theta0=None, optimizer="adamw", **arguments):
    network = network or Toy()
    theta0 = theta0 or {name: tensor.detach().clone() for name, tensor in named_state(network)}
    arguments.setdefault("compute_loss", lambda network, batch: network(**batch).loss)
    return TicketTrainer(
        network=network, theta0=theta0, weight_names=NAMES, make_optimizer=OPTIMIZERS[optimizer], **arguments
    )


def bits(tensor):
    return tensor.detach().contiguous().view({4: torch.int32, 8: torch.int64}[tensor.itemsize]).clone()


def assert_rewound(trainer, masks):
    for name, tensor in named_state(trainer.network):
        expected = trainer.theta0[name]
        if name in NAMES and masks is not None:
            expected = torch.where(masks[NAMES.index(name)], expected, 0.0)
        assert torch.equal(bits(tensor), bits(expected)), name


def test_rewinding_masks_the_weights_and_restores_everything_else():
    trainer = ticket_trainer()
    trainer.theta0["first.weight"][1, 0] = -0.0  # kept: its sign stays
    trainer.theta0["first.weight"][0, 1] = float("nan")  # pruned: becomes 0, not NaN
    trainer.theta0["second.weight"][0, 0] = -7.0  # pruned: becomes +0
    for _, tensor in named_state(trainer.network):
        tensor.data.fill_(77)
    trainer.rewind(MASKS)
    assert_rewound(trainer, MASKS)
    assert trainer.network.first.weight.tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert trainer.network.second.weight.tolist() == [[0.0, 5.0], [6.0, 7.0], [8.0, 0.0]]
    assert torch.signbit(trainer.network.first.weight).tolist() == [[False, False], [True, False]]
    assert not torch.signbit(trainer.network.second.weight).any()
    trainer.rewind(None)
    assert trainer.network.second.weight.tolist() == [[-7.0, 5.0], [6.0, 7.0], [8.0, 9.0]]


def test_theta0_is_every_parameter_and_buffer_once():
    network = Toy()
    network.again = network.second  # tied
    names = [name for name, _ in named_state(network)]
    assert len(set(names)) == len(names)
    assert {"norm.running_mean", "norm.num_batches_tracked", "offset", "second.weight"} <= set(names)
    assert "again.weight" not in names


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_pruned_weights_stay_zero_and_everything_else_is_trained(optimizer, clip):
    trainer = ticket_trainer(optimizer=optimizer, max_grad_norm=clip)
    seen = []

    def on_step():
        seen.append([bits(weight) for weight in trainer.weights])

    trained = trainer.train(MASKS, batches(6), seed=(0,), on_step=on_step)
    assert len(seen) == 6
    for weights in seen:
        for weight, mask in zip(weights, MASKS, strict=True):
            assert not weight[~mask].any()  # to the bit: +0
    for weight, last in zip(trained, seen[-1], strict=True):
        assert torch.equal(bits(weight), last)
        assert not weight.requires_grad
        assert weight.device.type == "cpu"
    for name, tensor in named_state(trainer.network):
        if name == "offset":
            continue
        changed = tensor != trainer.theta0[name]
        assert changed[MASKS[NAMES.index(name)]].all() if name in NAMES else changed.any(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("masks", [None, MASKS])
def test_frozen_weights_are_read_and_pruned_but_never_moved(optimizer, clip, masks):
    frozen = [
        torch.tensor([[True, True], [False, False]]),
        torch.tensor([[True, True], [False, True], [False, False]]),
    ]
    trainer = ticket_trainer(optimizer=optimizer, max_grad_norm=clip, frozen=frozen)
    trainer.train(masks, batches(5), seed=(0,))
    for name, weight, fixed, kept in zip(NAMES, trainer.weights, frozen, masks or FULL, strict=True):
        initial = torch.where(kept, trainer.theta0[name], 0.0)
        assert torch.equal(bits(weight)[fixed], bits(initial)[fixed])
        assert (weight != initial)[kept & ~fixed].all()
        assert not weight[~kept].any()
    assert not torch.equal(trainer.network.head.weight, trainer.theta0["head.weight"])


def test_gradients_of_frozen_weights_are_no_part_of_what_is_clipped():
    frozen = [torch.ones(2, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)]
    trainer = ticket_trainer(frozen=frozen, max_grad_norm=0.1)
    trainer.make_optimizer = lambda network: torch.optim.SGD(network.parameters(), lr=1.0)
    trainer.train(None, batches(1), seed=(0,))
    moved = [p - trainer.theta0[name] for name, p in trainer.network.named_parameters()]
    assert torch.cat([change.flatten() for change in moved]).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_the_learning_rate_can_follow_a_schedule():
    trainer, rates = ticket_trainer(optimizer="sgd"), []

    def halved(optimizer):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return scheduler

    trainer.train(MASKS, batches(4), seed=(0,), make_scheduler=halved)
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_returned_weights_are_copies():
    trainer = ticket_trainer()
    first = trainer.train(FULL, batches(2), seed=(0,))
    kept = [weight.clone() for weight in first]
    trainer.train(FULL, batches(2, seed=1), seed=(0,))
    assert all(torch.equal(*pair) for pair in zip(first, kept, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_full_mask_is_plain_training(optimizer):
    trainer, unmasked, plain = ticket_trainer(optimizer=optimizer), ticket_trainer(optimizer=optimizer), Toy()
    ours = trainer.train(FULL, batches(3), seed=(0,))
    assert all(torch.equal(*pair) for pair in zip(ours, unmasked.train(None, batches(3), seed=(0,)), strict=True))
    steps = OPTIMIZERS[optimizer](plain.train())
    for batch in batches(3):
        steps.zero_grad()
        plain(**batch).loss.backward()
        steps.step()
    assert torch.equal(ours[0], plain.first.weight)
    assert torch.equal(ours[1], plain.second.weight)


@pytest.mark.parametrize("fp16", [False, True])
def test_gradients_are_clipped_after_masking(fp16):
    """Clipping divides by the norm of the masked gradients, without the scaler's factor."""
    trainer = ticket_trainer(max_grad_norm=1e-3, fp16=fp16)
    trainer.make_optimizer = lambda network: torch.optim.SGD(network.parameters(), lr=1.0)
    trainer.train(MASKS, batches(1), seed=(0,))
    after = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.rewind(MASKS)
    before = [parameter.detach() for parameter in trainer.network.parameters()]
    moved = sum(float((new - old).square().sum()) for old, new in zip(before, after, strict=True))
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises(value):
    scales = iter([1.0, value, 1.0])
    trainer = ticket_trainer(compute_loss=lambda network, batch: network(**batch).loss * next(scales))
    with pytest.raises(FloatingPointError, match=f"loss became ({value}|nan).*learning_rate"):
        trainer.train(MASKS, batches(3), seed=(0,))
    scales = iter([1.0, 1.0, 1.0])
    again = trainer.train(MASKS, batches(3), seed=(0,))  # a later training works
    expected = ticket_trainer().train(MASKS, batches(3), seed=(0,))
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_the_result_depends_on_neither_earlier_trainings_nor_global_generators():
    expected = ticket_trainer(Toy(dropout=0.5)).train(MASKS, batches(4), seed=(3, 1))
    trainer = ticket_trainer(Toy(dropout=0.5))
    for route, masks in enumerate((FULL, MASKS, None)):
        trainer.train(masks, batches(5, seed=route), seed=(route,))
    torch.manual_seed(99)
    again = trainer.train(MASKS, batches(4), seed=(3, 1))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(expected, again, strict=True))
    other_seed = trainer.train(MASKS, batches(4), seed=(3, 2))
    assert not torch.equal(expected[0], other_seed[0])


def test_equal_seeds_give_equal_masks_and_kept_counts_are_exact():
    found = []
    for _ in range(2):
        trainer = ticket_trainer(Toy(dropout=0.5))
        masks = FULL
        for event, num_kept in enumerate((5, 3, 2)):
            pruned = prune(trainer.train(masks, batches(4), seed=(0, event)), masks, num_kept=num_kept)
            assert sum(int(mask.sum()) for mask in pruned) == num_kept
            assert all((new <= old).all() for new, old in zip(pruned, masks, strict=True))
            masks = pruned
        found.append(masks)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_all_generators_are_seeded_and_put_back():
    def noisy_loss(network, batch):
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return network(**batch).loss * (1 + draws[-1][0] + draws[-1][1])

    draws, drawn = [], []
    trainer = ticket_trainer(compute_loss=noisy_loss)
    for global_seed in range(2):
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        trainer.train(MASKS, batches(2), seed=(5,))
        after = random.getstate(), np.random.get_state(), torch.get_rng_state()
        assert before[0] == after[0]
        assert all(np.array_equal(*pair) for pair in zip(before[1], after[1], strict=True))
        assert torch.equal(before[2], after[2])
        drawn.append(tuple(draws))
        draws.clear()
    assert drawn[0] == drawn[1]
    trainer = ticket_trainer(compute_loss=lambda network, batch: network(**batch).loss * torch.rand(()) / 0)
    state = torch.get_rng_state()
    with pytest.raises(FloatingPointError):
        trainer.train(MASKS, batches(1), seed=(5,))
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_training_started_from_is_recorded():
    trainer = ticket_trainer()
    trainer.train(MASKS, batches(1), seed=(0,))
    masked = trainer.started_from
    trainer.train(MASKS, batches(2, seed=3), seed=(1,))
    assert trainer.started_from == masked
    trainer.train(FULL, batches(1), seed=(0,))
    assert trainer.started_from != masked
    assert len(masked) == 64


def test_losses_are_computed_under_autocast_and_scaled():
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    plain = ticket_trainer().train(MASKS, batches(3), seed=(0,))
    half = ticket_trainer(autocast=autocast).train(MASKS, batches(3), seed=(0,))
    assert len(entered) == 3
    assert not torch.equal(plain[0], half[0])
    scaled = ticket_trainer(fp16=True).train(MASKS, batches(3), seed=(0,))
    assert torch.allclose(plain[0], scaled[0], atol=1e-4)
    assert not scaled[0][~MASKS[0]].any()


def test_a_step_with_infinite_gradients_is_skipped_when_scaling():
    """An infinity at a pruned weight is masked away; one at a kept weight skips the step."""

    def train(*where):
        trainer = ticket_trainer(Toy(norm=False), fp16=True, max_grad_norm=1.0)
        infinity = torch.tensor(float("inf"))
        trainer.network.first.weight.register_hook(lambda gradient: gradient.index_put(where, infinity))
        return trainer.train(MASKS, batches(1), seed=(0,)), trainer

    zero, one = torch.tensor(0), torch.tensor(1)
    _, trainer = train(zero, zero)
    assert_rewound(trainer, MASKS)
    trained, trainer = train(zero, one)
    assert (trained[0] != trainer.theta0["first.weight"])[MASKS[0]].all()
    assert torch.isfinite(trained[0]).all()


def test_frozen_weights_are_pruned_but_not_trained():
    network = Toy()
    network.second.weight.requires_grad = False
    trained = ticket_trainer(network).train(MASKS, batches(2), seed=(0,))
    assert trained[1].tolist() == [[0.0, 5.0], [6.0, 7.0], [8.0, 0.0]]


def disconnected(first, second, network=None, batch=None):
    trainer = ticket_trainer(network or Toy())
    masks = [torch.tensor(first).view(2, 2), torch.tensor(second).view(3, 2)]
    batch = next(batches(1)) if batch is None else batch
    return trainer.is_disconnected([mask.bool() for mask in masks], batch)


def test_a_ticket_without_a_path_from_input_to_output_is_disconnected():
    assert not disconnected([1, 1, 1, 1], [1] * 6)
    assert not disconnected([0, 1, 0, 0], [0, 0, 1, 0, 0, 0])  # a single path, through weights of value 1 and 6
    assert disconnected([0, 1, 1, 1], [0] * 6)  # the second layer is empty
    assert disconnected([0, 0, 0, 0], [1] * 6)  # the first layer is empty
    assert disconnected([0, 0, 1, 1], [1, 0, 1, 0, 1, 0])  # neither layer is empty, but no path goes through both


def test_a_single_sample_does_not_show_disconnection():
    cut = [0] * 4, [1] * 6
    assert disconnected(*cut, Toy(norm=False), batch=next(batches(1, size=2)))
    assert not disconnected(*cut, Toy(norm=False), batch=next(batches(1, size=1)))


def test_disconnection_is_told_by_batch_statistics_in_evaluation_mode():
    network = Toy(dropout=0.5)
    network.norm.running_var.fill_(1e30)  # would shrink all differences to nothing
    nn.init.constant_(network.norm.bias, 0.5)  # otherwise, dropout would set only zeros to zero
    assert not disconnected([1, 1, 1, 1], [1] * 6, network)
    assert disconnected([0, 0, 1, 1], [1, 0, 1, 0, 1, 0], network)  # dropout would make them differ


def test_a_head_that_starts_at_zero_is_no_disconnection():
    network = Toy()
    nn.init.zeros_(network.head.weight)
    assert not disconnected([1, 1, 1, 1], [1] * 6, network)
