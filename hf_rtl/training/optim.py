"""The masked optimizer step: a step on a route moves the weights of its ticket and no others (paper, Algorithm 2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from ..modeling.mask_bank import integer_dtype
from ..modeling.modeling_rtl import RTLModel


# Number of elements that a CPU updates at once, so that all intermediate results stay in its cache.
CHUNK_SIZE = 2**18


class _MaskedOptimizer(Optimizer):
    """
    The base of the two optimizers below: prunable weights and private parameters get a masked update, all other
    parameters torch's fused update.

    Masking the gradient alone is not enough: the momentum of other routes' steps and weight decay would move weights
    outside the ticket. Here neither the weight nor its per-element state changes where the mask is 0.
    """

    _state_names: tuple[str, ...]

    def __init__(self, params: Iterable, model: RTLModel, defaults: dict[str, Any]) -> None:
        self.routed_model = model
        # `fused` makes `load_state_dict` put step counts on their parameter's device, where the fused update of the
        # other parameters needs them.
        super().__init__(params, {**defaults, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """
        One update for the routes trained since the last one; the union of their tickets masks it.

        Raises:
            RuntimeError: no route was trained since the last `step` or `zero_grad`, or no parameter has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not _has_gradient([parameter for group in self.param_groups for parameter in group["params"]]):
            raise RuntimeError("no parameter has a gradient; call `loss.backward()` before `step()`.")
        masked_parameters = self.routed_model.masked_parameters
        masks: dict[Tensor, Tensor] = {}
        if _has_gradient(masked_parameters):
            masks = dict(zip(masked_parameters, self.routed_model.update_masks(), strict=True))
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            masked = [parameter for parameter in parameters if parameter in masks]
            for parts in _batches([self._tensors(parameter, masks[parameter]) for parameter in masked]):
                self._update_masked(group, *parts)
            dense = [parameter for parameter in parameters if parameter not in masks]
            if dense:
                self._update_dense(group, dense)
        self.routed_model.routes_since_update.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and forgets the routes that they came from."""
        super().zero_grad(set_to_none)
        self.routed_model.routes_since_update.clear()

    def _tensors(self, parameter: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """(parameter, gradient, mask, *state), all of one shape and memory layout."""
        state = self.state[parameter]
        for name in self._state_names:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return parameter, parameter.grad, mask, *(state[name] for name in self._state_names)

    def _update_masked(self, group: dict[str, Any], *parts: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def _update_dense(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        raise NotImplementedError


class MaskedAdamW(_MaskedOptimizer):
    """
    AdamW whose step on a route moves the weights of its ticket and no others (paper, Algorithm 2).

    Every element of a prunable weight has its own bias corrections 1 − β^t, where t is the number of *its* updates.
    One count for all elements would move an element that few tickets keep several times too far. With a single route
    that keeps all weights, it equals `torch.optim.AdamW` up to rounding. Not supported: `amsgrad`, `maximize`.

    Args:
        params (`Iterable`): parameters or parameter groups.
        model ([`RTLModel`]): knows which weights are masked, and which routes were trained since the last step.
        lr (`float`, *optional*, defaults to 1e-3): the learning rate.
        betas (`tuple`, *optional*, defaults to `(0.9, 0.999)`): as in torch.
        eps (`float`, *optional*, defaults to 1e-8): as in torch.
        weight_decay (`float`, *optional*, defaults to 0.0): as in torch, which has another default.
    """

    # correction1 = 1 − β1^t and correction2 = 1 − β2^t follow the recurrence of the moments, with gradients of 1.
    _state_names = ("exp_avg", "exp_avg_sq", "correction1", "correction2")

    def __init__(
        self,
        params: Iterable,
        model: RTLModel,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, model, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._ones_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _update_masked(self, group, params, grads, masks, exp_avgs, exp_avg_sqs, corrections1, corrections2):
        beta1, beta2 = group["betas"]
        ones = self._ones(params)
        weights = _where_kept(1 - beta1, masks, params)
        torch._foreach_lerp_(exp_avgs, grads, weights)
        torch._foreach_lerp_(corrections1, ones, weights)
        weights = _where_kept(1 - beta2, masks, params)
        torch._foreach_lerp_(exp_avg_sqs, torch._foreach_mul(grads, grads), weights)
        torch._foreach_lerp_(corrections2, ones, weights)
        # An element without any update gives 0/0 here; `_move` masks it to 0.
        denominators = torch._foreach_div(exp_avg_sqs, corrections2)
        # The square root as 1 / rsqrt: on CPUs torch's sqrt is ten times slower on zeros, and most masked state is 0.
        torch._foreach_rsqrt_(denominators)
        torch._foreach_reciprocal_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(exp_avgs, corrections1)
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        _move(params, updates, masks, group["lr"])

    def _ones(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Ones of the shapes in `like`, views of one small tensor, which CPUs read faster than an expanded scalar."""
        largest = max(tensor.numel() for tensor in like)
        key = like[0].device, like[0].dtype
        if key not in self._ones_memory or self._ones_memory[key].numel() < largest:
            self._ones_memory[key] = like[0].new_ones(largest)
        return [self._ones_memory[key][: tensor.numel()].view(tensor.shape) for tensor in like]

    def _update_dense(self, group, parameters):
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class MaskedSGD(_MaskedOptimizer):
    """
    SGD with momentum and coupled weight decay, whose step on a route moves only its ticket (paper, Algorithm 2).

    With a single route that keeps all weights, it equals `torch.optim.SGD` up to rounding. Not supported: `dampening`,
    `maximize`.

    Args:
        params (`Iterable`): parameters or parameter groups.
        model ([`RTLModel`]): knows which weights are masked, and which routes were trained since the last step.
        lr (`float`, *optional*, defaults to 1e-3): the learning rate.
        momentum (`float`, *optional*, defaults to 0.0): as in torch.
        weight_decay (`float`, *optional*, defaults to 0.0): as in torch.
        nesterov (`bool`, *optional*, defaults to `False`): as in torch.
    """

    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable,
        model: RTLModel,
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params, model, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        )

    def _update_masked(self, group, params, grads, masks, buffers):
        momentum = group["momentum"]
        updates = torch._foreach_add(grads, params, alpha=group["weight_decay"]) if group["weight_decay"] else grads
        if momentum:
            # The buffer changes by (momentum − 1) · buffer + gradient where kept, and stays the same elsewhere.
            changes = torch._foreach_add(updates, buffers, alpha=momentum - 1)
            _and_all(changes, masks)
            torch._foreach_add_(buffers, changes)
            updates = torch._foreach_add(updates, buffers, alpha=momentum) if group["nesterov"] else buffers
        _move(params, [update.clone() for update in updates], masks, group["lr"])

    def _update_dense(self, group, parameters):
        states = [self.state[parameter] for parameter in parameters]
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            list(parameters),
            [parameter.grad for parameter in parameters],
            buffers,
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )
        if group["momentum"]:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer


def masked_optimizer(
    optimizer_class: type[Optimizer], groups: list[dict[str, Any]], kwargs: Mapping[str, Any], model: RTLModel
) -> Optimizer:
    """
    An optimizer with a masked update, of the fast kind if that has all of `kwargs`.

    Args:
        optimizer_class (`type[Optimizer]`): a class of torch optimizers.
        groups (`list[dict]`), kwargs (`Mapping`): its arguments.
        model ([`RTLModel`]): the model of the parameters.
    """
    masked: Any = {torch.optim.AdamW: MaskedAdamW, torch.optim.SGD: MaskedSGD}.get(optimizer_class)
    own = {name: value for name, value in kwargs.items() if name != "fused" and (name, value) != ("dampening", 0)}
    if masked is not None and own.keys() <= inspect.signature(masked).parameters.keys():
        return masked(groups, model, **own)
    return mask_updates(optimizer_class(groups, **kwargs), model)


def mask_updates(optimizer: Optimizer, model: RTLModel) -> Optimizer:
    """
    Makes a step of any torch optimizer move the weights of the trained routes' tickets only (paper, Algorithm 2).

    Prunable weights, private parameters and their per-element state are copied before a step, and put back after it
    where the mask is 0. This costs a copy of both, and all elements share one step count; [`MaskedAdamW`] and
    [`MaskedSGD`] have neither drawback. Returns the same optimizer.
    """
    before: dict[Tensor, list[tuple[str | None, Tensor]]] = {}

    def keep(*_: Any) -> None:
        if not _has_gradient(model.masked_parameters):
            return
        model.update_masks()
        for parameter in model.masked_parameters:
            state = optimizer.state.get(parameter, {})
            own = [(name, value.clone()) for name, value in state.items() if _is_per_element(value, parameter)]
            before[parameter] = [(None, parameter.detach().clone()), *own]

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        if not before:
            return
        for parameter, mask in zip(model.masked_parameters, model.update_masks(), strict=True):
            state = optimizer.state.get(parameter, {})
            old = dict(before.pop(parameter))
            _restore(parameter, old.pop(None), mask)
            for name, value in state.items():
                if _is_per_element(value, parameter):
                    _restore(value, old.get(name, torch.zeros_like(value)), mask)
        model.routes_since_update.clear()

    zero_grad = optimizer.zero_grad

    def forget(set_to_none: bool = True) -> None:
        zero_grad(set_to_none)
        model.routes_since_update.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(put_back)
    # After a step that a gradient scaler skips, `zero_grad` alone forgets the routes of the dropped gradients.
    optimizer.zero_grad = forget  # type: ignore[method-assign]
    return optimizer


def _has_gradient(parameters: Sequence[Tensor]) -> bool:
    """Whether any parameter has a gradient. If no masked one has, none moves, and no route needs to be trained."""
    return any(parameter.grad is not None for parameter in parameters)


def _is_per_element(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _restore(new: Tensor, old: Tensor, mask: Tensor) -> None:
    """Copies `old` into `new` where `mask` is 0."""
    new.copy_(torch.where(mask != 0, new, old))


def _batches(tensors: Sequence[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """
    Yields groups of tensors of one device and dtype to update at once, each as one list per kind of tensor.

    On CPUs a group fits the cache, and large tensors are split; on accelerators a group holds all tensors of a device
    and dtype, because the number of kernel launches counts there.
    """
    group: list[tuple[Tensor, ...]] = []
    size = 0
    for parts in tensors:
        if group and (parts[0].device, parts[0].dtype) != (group[0][0].device, group[0][0].dtype):
            yield [list(kind) for kind in zip(*group, strict=True)]
            group, size = [], 0
        limit = CHUNK_SIZE if parts[0].device.type == "cpu" else 2**62
        pieces = [parts]
        if parts[0].numel() > limit and all(part.is_contiguous() for part in parts):
            pieces = list(zip(*(part.view(-1).split(limit) for part in parts), strict=True))
        for piece in pieces:
            if group and size + piece[0].numel() > limit:
                yield [list(kind) for kind in zip(*group, strict=True)]
                group, size = [], 0
            group.append(piece)
            size += piece[0].numel()
    if group:
        yield [list(kind) for kind in zip(*group, strict=True)]


def _where_kept(value: float, masks: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """`value` where the integer masks have their bits set, 0 elsewhere, in the dtypes of `like`."""
    bits = torch.tensor(value, dtype=like[0].dtype, device=like[0].device).view(integer_dtype(like[0].dtype))
    return [torch.bitwise_and(mask, bits).view(tensor.dtype) for mask, tensor in zip(masks, like, strict=True)]


def _and_all(values: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    for value, mask in zip(values, masks, strict=True):
        value.view(mask.dtype).bitwise_and_(mask)


def _move(params: Sequence[Tensor], updates: Sequence[Tensor], masks: Sequence[Tensor], lr: float) -> None:
    """params −= lr · updates where kept. Elsewhere −lr · 0 = −0 is added, which changes no bit."""
    _and_all(updates, masks)
    torch._foreach_add_(list(params), list(updates), alpha=-lr)
