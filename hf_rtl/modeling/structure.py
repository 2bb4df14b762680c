"""Whether the tensors of a model are those that its configuration builds, so that what is saved can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn


def check_structure(model: nn.Module, built: nn.Module, remedy: str) -> None:
    """
    Raises `ValueError`, with the names and shapes that differ, unless `model` has the tensors of `built`, and shares
    none that `built` does not share.

    Args:
        model (`nn.Module`): the model.
        built (`nn.Module`): what the model's configuration builds; it may be on the device `"meta"`.
        remedy (`str`): the sentence of the error that says what to do.
    """
    found, expected = tensor_shapes(model), tensor_shapes(built)
    shared = shared_tensors(built)
    for name, source in shared_tensors(model).items():
        if shared.get(name) != source:
            raise ValueError(
                f"{name} is the same tensor as {source}, which the configuration does not say, so that a saved copy "
                "could not be loaded: let the configuration tie them, as by `tie_word_embeddings`, or untie them. "
                f"{remedy}"
            )
    differing = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if differing:
        listed = "; ".join(
            f"{name}: {found.get(name, 'nothing')} here, {expected.get(name, 'nothing')} there"
            for name in differing[:3]
        )
        raise ValueError(
            f"the model has other tensors than its configuration builds, so that a saved copy could not be loaded: "
            f"{listed}{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}. {remedy}"
        )


def check_resizing(backbone: nn.Module, resized: nn.Module, masked: Sequence[str], private: Sequence[str]) -> None:
    """Raises `ValueError` if the vocabulary of `resized` changes the shape of a masked or private parameter."""
    for owner, names in (("masks cover", masked), ("every route has its own copy of", private)):
        for name in names:
            before, after = backbone.get_parameter(name).shape, resized.get_parameter(name).shape
            if before != after:
                raise ValueError(
                    f"`new_num_tokens` would change {name!r} from {tuple(before)} to {tuple(after)}, and {owner} it. "
                    f"Resize the backbone before `from_backbone`, or leave {name!r} out of `prune_include` and "
                    "`private_parameters`."
                )


def shared_tensors(model: nn.Module, known: Iterable[str] = ()) -> dict[str, str]:
    """
    Later name -> first name of parameters and buffers with several names, as of a module that is registered twice.
    Those of which transformers knows any name, in `known`, are left out.
    """
    known = set(known)
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        source = first.setdefault(id(tensor), name)
        if source != name and not known & {source, name}:
            shared[name] = source
    return shared


def save_shared_tensors(model: nn.Module) -> None:
    """Makes `state_dict` of `model` hold a copy for each further name of a tensor, as safetensors files demand."""
    shared = shared_tensors(model, chain.from_iterable(getattr(model, "all_tied_weights_keys", {}).items()))

    def copy_shared(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in shared:
            state[prefix + name] = state[prefix + name].clone()

    if shared:
        model.register_state_dict_post_hook(copy_shared)


def tensor_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of all parameters and buffers that a model saves."""
    # Quantised modules of torch keep other values than tensors in their state.
    state = model.state_dict().items()
    return {name: list(tensor.shape) for name, tensor in state if isinstance(tensor, Tensor)}
