"""The training of one ticket: a masked copy of the network, from θ0, on one route (paper, Algorithm 1)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune

from ..modeling.hashing import hash_tensors
from ..modeling.mask_bank import integer_dtype
from ..modeling.masking import and_masks
from ..modeling.norm_statistics import tracking_layers
from ..modeling.prunable import parameter_aliases
from .randomness import seeded
from .training_args import RTLTrainingArguments


@dataclass
class TicketTrainer:
    """
    Trains a plain copy of a backbone from masked initial weights. No DDP and no collectives: routes are independent.

    Args:
        network (`nn.Module`): a copy of the backbone that this object may change.
        theta0 (`dict[str, Tensor]`): every parameter and buffer that training starts from, by name.
        weight_names (`list[str]`): the prunable weights, in the bank's order.
        make_optimizer (`Callable`): network -> fresh optimizer.
        compute_loss (`Callable`): (network, inputs) -> scalar loss.
        autocast (`Callable`): makes the context in which the loss is computed; none by default.
        prepare (`Callable`): batch -> inputs of the network; by default the batch itself.
        frozen (`list[Tensor]`, *optional*): `bool`, one per prunable weight. Training changes no bit of these
            elements, but pruning may remove them.
        max_grad_norm (`float`, defaults to 0.0): clip masked gradients to this norm; 0 does not clip.
        fp16 (`bool`, defaults to `False`): whether to scale losses.
    """

    network: nn.Module
    theta0: Mapping[str, Tensor]
    weight_names: Sequence[str]
    make_optimizer: Callable[[nn.Module], Optimizer]
    compute_loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch
    frozen: Sequence[Tensor] | None = None
    max_grad_norm: float = 0.0
    fp16: bool = False

    def __post_init__(self) -> None:
        aliases = parameter_aliases(self.network)
        self.weights: list[Tensor] = [getattr(*aliases[name][0]) for name in self.weight_names]
        # Hash of all parameters and buffers at the start of the latest training.
        self.started_from = ""

    @torch.no_grad()
    def rewind(self, masks: Sequence[Tensor] | None) -> None:
        """Sets every parameter and buffer to θ0, and prunable weights to 0 outside the mask."""
        for name, tensor in named_state(self.network):
            tensor.copy_(self.theta0[name])
        if masks is not None:
            for weight, mask in zip(self.weights, masks, strict=True):
                weight.masked_fill_(~mask.to(weight.device), 0)

    def train(
        self,
        masks: Sequence[Tensor] | None,
        batches: Iterable[dict[str, Any]],
        *,
        seed: Sequence[int],
        on_step: Callable[[], None] = lambda: None,
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> list[Tensor]:
        """
        Trains from m ⊙ θ0 on `batches`; gradients are masked, so pruned weights stay 0.

        Args:
            masks (`Sequence[Tensor]`, *optional*): `bool`, one per prunable weight; `None` keeps all.
            batches (`Iterable`): arguments of `prepare`.
            seed (`Sequence[int]`): seed of dropout and other randomness. The global generators keep their states.
            on_step (`Callable`): called after every step.
            make_scheduler (`Callable`, *optional*): optimizer -> scheduler of the learning rate; constant by default.

        Returns:
            The trained prunable weights, on the CPU.

        Raises:
            FloatingPointError: the loss became NaN or infinite.
        """
        device = next(self.network.parameters()).device
        with seeded(seed, device):
            self.begin(masks)
            scheduler = None if make_scheduler is None else make_scheduler(self._optimizer)
            total_loss = torch.zeros((), device=device)
            for batch in batches:
                total_loss += self.step(batch)
                if scheduler is not None:
                    scheduler.step()
                on_step()
            # Checked only once, because a check in every step would wait for the device.
            if not torch.isfinite(total_loss):
                raise FloatingPointError(
                    f"the loss became {total_loss.item()}; lower `learning_rate`, or check the data."
                )
            self._optimizer.zero_grad()
        return [weight.detach().cpu().clone() for weight in self.weights]

    def begin(self, masks: Sequence[Tensor] | None) -> None:
        """Rewinds to m ⊙ θ0 and makes a fresh optimizer and scaler."""
        self.rewind(masks)
        self.started_from = hash_tensors(dict(named_state(self.network)))
        self.network.train()
        self._optimizer = self.make_optimizer(self.network)
        device = next(self.network.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.fp16)
        self._masks: list[Tensor] = []
        self._frozen: list[tuple[Tensor, Tensor]] = []
        if self.frozen is not None:
            kept = [~frozen for frozen in self.frozen]
            masks = (
                kept if masks is None else [mask & own.to(mask.device) for mask, own in zip(masks, kept, strict=True)]
            )
            self._frozen = [
                (frozen.to(weight.device), weight.detach().clone())
                for frozen, weight in zip(self.frozen, self.weights, strict=True)
            ]
        if masks is not None and not all(bool(mask.all()) for mask in masks):
            self._masks = [_as_integers(mask, weight) for mask, weight in zip(masks, self.weights, strict=True)]

    def step(self, batch: dict[str, Any]) -> Tensor:
        """One optimizer step on `batch` with masked gradients. Returns the loss, still on its device."""
        self._optimizer.zero_grad()
        inputs = self.prepare(batch)
        with self.autocast():
            loss = self.compute_loss(self.network, inputs)
        self._scaler.scale(loss).backward()
        for weight, mask in zip(self.weights, self._masks, strict=False):
            if weight.grad is not None:
                weight.grad = and_masks(weight.grad, mask)
        if self.max_grad_norm > 0:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            # A masked gradient is not enough: weight decay moves weights without a gradient.
            for weight, (frozen, value) in zip(self.weights, self._frozen, strict=False):
                weight.copy_(torch.where(frozen, value, weight))
        return loss.detach()

    @torch.no_grad()
    def is_disconnected(self, masks: Sequence[Tensor], batch: dict[str, Any]) -> bool:
        """
        Whether the rewound ticket has the same output for every sample of `batch`: pruning has cut it from its input.

        Normalisation layers use batch statistics: initial running statistics could scale differences down to 0.
        Returns `False` if the batch cannot show it: with a single sample, or if the output is the same without pruning
        too, for example because the head starts at zero.
        """
        inputs = {name: value for name, value in self.prepare(batch).items() if name != "labels"}
        network: Any = self.network
        if isinstance(network, PreTrainedModel) and network.config.is_encoder_decoder and network.can_generate():
            # The decoder gets its start token alone, so that its output depends on the encoder's input only.
            inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
            like = next(iter(inputs.values()))
            start = torch.tensor(network.config.decoder_start_token_id, device=like.device)
            inputs["decoder_input_ids"] = start.expand(len(like), 1)
        return self._is_constant(masks, inputs) and not self._is_constant(None, inputs)

    def _is_constant(self, masks: Sequence[Tensor] | None, inputs: dict[str, Any]) -> bool:
        self.rewind(masks)
        self.network.eval()
        for layer in tracking_layers(self.network):
            layer.train()
        with self.autocast():
            output = self.network(**inputs, return_dict=True)
        main = output.logits if "logits" in output else output[0]
        return bool((main == main[:1]).all())


def change_for_training(network: Any, args: RTLTrainingArguments) -> None:
    """Makes a network recompute activations and add noise to embeddings, as `Trainer` does to its model."""
    if args.gradient_checkpointing:
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its new name, which older versions lack
            network.gradient_checkpointing_enable(kwargs or None, **options)
    if args.neftune_noise_alpha is not None:
        activate_neftune(network, args.neftune_noise_alpha)


def named_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter and buffer once, tied ones under their first name."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def _as_integers(mask: Tensor, weight: Tensor) -> Tensor:
    """A `bool` mask as integers with all bits set where kept, with element size and memory layout of the weight."""
    integers = torch.empty_like(weight, dtype=integer_dtype(weight.dtype), requires_grad=False)
    return integers.copy_(mask).neg_()
