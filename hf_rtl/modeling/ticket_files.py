"""Ticket files: tickets without their model, for other copies of it."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from torch import Tensor
from transformers.utils.hub import extract_commit_hash

from .configuration_rtl import VERSION, check_format_version
from .files import read_json, read_tensors, write_json, write_tensors, written_whole
from .hashing import hashes, matches_fingerprint
from .hub import CARD_FILE, write_tickets_page
from .mask_bank import count_bits, unpack
from .mask_coding import decode_bits, decode_mask, decode_rows, encode, encode_mask, encode_rows, format_version
from .norm_statistics import tracked_buffers
from .prunable import parameter_aliases
from .routed_model import RoutedModel


# Newest version of ticket files; see `mask_coding.format_version`.
TICKETS_FORMAT_VERSION = 2
INDEX_FILE = "tickets.json"
TICKETS_PATTERN = "ticket-*.safetensors"

_FILE_NAME = re.compile(r"ticket-\d{3,6}\.safetensors")


# What tickets are made of


def dense_tensors(model: RoutedModel) -> dict[str, Tensor]:
    """
    Parameters and buffers of the backbone that no mask covers, without the buffers of which every route has a row.
    Private parameters have the values from before they became private, as in a copy that still shares them.
    """
    others = {weight.data_ptr() for weight in model.masker.weights}
    if model.norm_statistics is not None:
        others |= {module.get_buffer(name).data_ptr() for module, name in tracked_buffers(model.backbone)}
    return {name: tensor for name, tensor in model.backbone.state_dict().items() if tensor.data_ptr() not in others}


def _rows(model: RoutedModel, route: int) -> dict[str, list[Tensor]]:
    """The rows of a route, by the name of the tensor that has them one after the other in a ticket's file."""
    statistics = [] if model.norm_statistics is None else model.norm_statistics.row(route)
    return {
        "statistics": [row for row in statistics if row.is_floating_point()],
        "num_batches_tracked": [row for row in statistics if not row.is_floating_point()],
        "private": model.private_parameters.row(route),
    }


def _selected(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.detach()[mask.to(weight.device)]


# Saving


def save_tickets(
    model: RoutedModel, directory: Path, routes: Sequence[int], *, base_routes: Sequence[int]
) -> dict[str, Any]:
    """
    Writes the tickets of `routes` into a folder, the index last. A card of tickets in it is updated.

    ```
    tickets.json             the index: the base, hashes of what tickets read of it, a list of the tickets
    ticket-000.safetensors   mask: coded bits; statistics, num_batches_tracked, private: the route's rows, one after
                             the other; added: coded bits of kept weights that the base lacks; values: these weights;
                             private_kept: if there, what of the private rows is in the file, the rest being zero
    ```

    The bits are of weights, or of units where that is smaller, see `mask_coding.py`. With any of the latter the format
    has version 2, else 1.

    Args:
        base_routes (`Sequence[int]`): routes whose union the base has.

    Returns:
        The index.
    """
    base = model.mask_bank.packed_union(base_routes)
    with written_whole(directory, last=INDEX_FILE, stale=TICKETS_PATTERN) as staging:
        tickets = []
        for number, route in enumerate(routes):
            tensors, about = _ticket(model, route, base)
            file = f"ticket-{number:03d}.safetensors"
            write_tensors(staging / file, tensors)
            tickets.append({"name": model.route_names[route], "file": file, **about})
        index = {
            "format_version": format_version(coding for ticket in tickets for coding in ticket["coding"].values()),
            "hf_rtl_version": VERSION,
            "base": base_fingerprint(model),
            "ticket_task": model.config.ticket_task,
            "norm_statistics": model.config.norm_statistics,
            "private_parameters": list(model.private_parameters.names),
            "weights": [[name, list(shape)] for name, shape in model.config.prunable],
            "dense": {name: hashes({name: tensor}) for name, tensor in dense_tensors(model).items()},
            "tickets": tickets,
        }
        write_json(staging / INDEX_FILE, index)
        known = directory / CARD_FILE
        write_tickets_page(staging, index, known.read_bytes() if known.exists() else b"")
    return index


def _ticket(model: RoutedModel, route: int, base: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ticket's file, and its entry in the index."""
    bank = model.mask_bank
    rows = [rows[route] for rows in bank.packed]
    added = [row & ~base_row for row, base_row in zip(rows, base, strict=True)]
    tensors, coding = {}, {}
    coding["mask"], tensors["mask"] = encode_mask(bank, route)
    in_base, values = {}, []
    for name, weight, row, added_row in zip(bank.weight_names, model.masker.weights, rows, added, strict=True):
        values.append(_selected(weight, unpack(added_row, weight.shape)))
        read = _selected(weight, unpack(row & ~added_row, weight.shape))
        if len(read):
            in_base[name] = hashes({name: read})
    num_added = sum(map(len, values))
    if num_added:
        coding["added"], tensors["added"] = encode(torch.cat(added))
        tensors["values"] = torch.cat(values)
    for name, parts in _rows(model, route).items():
        kept = encode_rows(parts) if name == "private" else None
        if kept is not None:
            coding["private_kept"], tensors["private_kept"], parts = kept.coding, kept.coded, kept.left()
        if parts:
            tensors[name] = torch.cat([part.detach().reshape(-1) for part in parts])
    about = {
        "kept": sum(int(count_bits(row)) for row in rows),
        "added": num_added,
        "threshold": None if model.config.thresholds is None else model.config.thresholds[route],
        "coding": coding,
        "in_base": in_base,
    }
    return tensors, about


def base_fingerprint(model: RoutedModel) -> dict[str, Any]:
    """
    The identity of the model's base: the `fingerprint` of what its tickets, except added ones, are made of, and if it
    came from the Hub, `repo` and `revision`.
    """
    own = [route for route, name in enumerate(model.route_names) if name not in model.config.added_routes]
    union = model.mask_bank.packed_union(own)
    parts = zip(model.mask_bank.weight_names, model.masker.weights, union, strict=True)
    kept = {name: _selected(weight, unpack(row, weight.shape)) for name, weight, row in parts}
    tensors = {**kept, **dense_tensors(model), "union of the masks": torch.cat(union)}
    if model.config.base is not None and matches_fingerprint(tensors, model.config.base["fingerprint"]):
        return model.config.base
    return {"fingerprint": hashes(tensors)}


# Loading


def read_index(name_or_path: str | Path, **hub_arguments: Any) -> dict[str, Any]:
    """
    The index of a folder or a Hub repository with ticket files.

    Args:
        **hub_arguments: to `hf_hub_download`, such as `revision` and `token`.

    Raises:
        ValueError: there are no tickets, or their index is damaged or of a newer version.
    """
    return _TicketFolder(name_or_path, hub_arguments).index


class _TicketFolder:
    """A folder or a repository with ticket files. All files of a repository are taken from one commit."""

    def __init__(self, name_or_path: str | Path, hub_arguments: Mapping[str, Any]) -> None:
        self.name = str(name_or_path)
        self._hub_arguments = dict(hub_arguments)
        try:
            file = self.path(INDEX_FILE)
            file.stat()  # a folder may lack it
        except LocalEntryNotFoundError:  # it is a repository, and the Hub cannot be reached
            raise
        except (FileNotFoundError, RemoteEntryNotFoundError):
            raise ValueError(
                f"{self.name!r} holds no tickets: it has no {INDEX_FILE}, which `save_tickets` writes. For a whole "
                "model use `RTLModel.from_pretrained`."
            ) from None
        commit = extract_commit_hash(str(file), None)
        if commit is not None:
            self._hub_arguments["revision"] = commit
        try:
            self.index = read_json(file)
        except ValueError:
            raise self.damaged(INDEX_FILE) from None
        try:
            check_format_version(self.index, TICKETS_FORMAT_VERSION, f"{self.name!r}")
            whole = _is_whole(self.index)
        except (AttributeError, KeyError, TypeError):
            raise self.damaged(INDEX_FILE) from None
        if not whole:
            raise self.damaged(INDEX_FILE)

    def path(self, file: str) -> Path:
        folder = Path(self.name)
        if folder.is_dir():
            return folder / file
        return Path(hf_hub_download(self.name, file, **self._hub_arguments))

    def damaged(self, file: str) -> ValueError:
        return ValueError(f"{file} of {self.name!r} is damaged.")

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Names the file whose content is refused within the context."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{file} of {self.name!r} is damaged: {error}") from error


def _is_whole(index: Mapping[str, Any]) -> bool:
    """Whether an index has all entries, with the types that `save_tickets` writes."""
    kinds = {"base": dict, "ticket_task": str, "norm_statistics": str, "dense": dict}
    kinds |= dict.fromkeys(("private_parameters", "weights", "tickets"), list)
    ticket_kinds = {"name": str, "file": str, "kept": int, "added": int, "coding": dict, "in_base": dict}
    names = [entry["name"] for entry in index["tickets"]]
    return (
        all(isinstance(index[key], kind) for key, kind in kinds.items())
        and all(type(entry[key]) is kind for entry in index["tickets"] for key, kind in ticket_kinds.items())
        and all(names)
        and len(set(names)) == len(names)
        and all(_FILE_NAME.fullmatch(entry["file"]) for entry in index["tickets"])
        and all(type(name) is str for name in index["private_parameters"])
        and all(_is_threshold(entry["threshold"]) for entry in index["tickets"])
        and all(isinstance(index["base"][key], str) for key in index["base"].keys() & {"repo", "revision"})
        and len(index["weights"]) > 0
        and all(len(weight) == 2 and type(weight[0]) is str for weight in index["weights"])
        and all(type(size) is int and size > 0 for _, shape in index["weights"] for size in shape)
    )


def _is_threshold(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


@dataclass
class _Ticket:
    """What a ticket's file holds, on the CPU. Masks are one `bool` tensor per prunable weight, of its shape."""

    name: str
    masks: list[Tensor]
    added: list[Tensor]
    values: list[Tensor]  # of the weights in `added`, in the order of their positions
    statistics: list[Tensor]  # the route's row, one tensor per buffer
    private: dict[str, Tensor]  # the route's row, by name
    threshold: float | None


def load_tickets(
    model: RoutedModel,
    name_or_path: str | Path,
    routes: Sequence[str] | None,
    *,
    rename: Mapping[str, str] | Literal["auto"] | None,
    **hub_arguments: Any,
) -> list[str]:
    """See [`RTLModel.load_tickets`]. Nothing is changed before everything has been checked."""
    folder = _TicketFolder(name_or_path, hub_arguments)
    entries = _chosen(folder, routes)
    names = _new_names([entry["name"] for entry in entries], model.route_names, rename)
    try:
        _check_same_kind(model, folder)
        tickets = [_read_ticket(model, folder, entry, name) for entry, name in zip(entries, names, strict=True)]
        _check_same_base(model, folder, entries, tickets)
    except (AttributeError, KeyError, TypeError):
        raise folder.damaged(INDEX_FILE) from None
    weights = _with_added_weights(model, tickets)
    with torch.no_grad():
        for weight, changed in zip(model.masker.weights, weights, strict=True):
            weight.copy_(changed)
    for ticket in tickets:
        model.append_ticket(
            ticket.name,
            ticket.masks,
            statistics=ticket.statistics,
            private_parameters=ticket.private,
            threshold=ticket.threshold,
            brings_weights=any(map(len, ticket.values)),
        )
    return names


def _chosen(folder: _TicketFolder, routes: Sequence[str] | None) -> list[dict[str, Any]]:
    entries = {entry["name"]: entry for entry in folder.index["tickets"]}
    unknown = [route for route in routes or () if route not in entries]
    if unknown or isinstance(routes, str) or len(set(routes or ())) < len(routes or ()):
        raise ValueError(
            f"`routes` = {routes!r} must be a list of names of {', '.join(map(repr, entries))}, the tickets of "
            f"{folder.name!r}, each at most once."
        )
    return [entries[route] for route in (entries if routes is None else routes)]


def _new_names(
    names: Sequence[str], known: Sequence[str], rename: Mapping[str, str] | Literal["auto"] | None
) -> list[str]:
    """The names under which tickets are added to a model that has routes of the names `known`."""
    is_dict = isinstance(rename, Mapping) and all(isinstance(new, str) and new for new in rename.values())
    if not (rename is None or rename == "auto" or is_dict):
        raise ValueError(f"`rename` must be 'auto' or a dict from names in the files to new ones, got {rename!r}.")
    if isinstance(rename, Mapping):
        unknown = [name for name in rename if name not in names]
        if unknown:
            raise ValueError(f"`rename` has {unknown[0]!r}, but the tickets are {', '.join(map(repr, names))}.")
        names = [rename.get(name, name) for name in names]
    taken = list(known)
    for name in names:
        if name in taken and rename != "auto":
            raise ValueError(
                f"the model has a route {name!r} already. Give the new ticket another name, with "
                f"`rename={{{name!r}: {_free(name, taken)!r}}}` or `rename='auto'`, or remove the old one by "
                f"`model.drop_route({name!r})`."
            )
        taken.append(_free(name, taken))
    return taken[len(known) :]


def _free(name: str, taken: Sequence[str]) -> str:
    candidates = (f"{name}-{number}" for number in itertools.count(2))
    return name if name not in taken else next(candidate for candidate in candidates if candidate not in taken)


def _check_same_kind(model: RoutedModel, folder: _TicketFolder) -> None:
    for name in ("ticket_task", "norm_statistics"):
        if folder.index[name] != getattr(model.config, name):
            raise ValueError(
                f"the tickets of {folder.name!r} have {name}={folder.index[name]!r}, but the model has "
                f"{getattr(model.config, name)!r}: they are of another base."
            )
    theirs = [(name, list(shape)) for name, shape in folder.index["weights"]]
    ours = [(name, list(shape)) for name, shape in model.config.prunable]
    if theirs != ours:
        differing = [weight for weight in theirs if weight not in ours] + [w for w in ours if w not in theirs]
        raise ValueError(
            f"the tickets of {folder.name!r} are for another backbone: its prunable weights differ from the model's, "
            f"as {', '.join(f'{name} {shape}' for name, shape in differing[:3]) or 'in their order'}."
        )

    alone = {name for name, places in parameter_aliases(model.backbone).items() if len(places) == 1}
    foreign = set(folder.index["private_parameters"]) - (alone - set(model.mask_bank.weight_names))
    if foreign:
        raise ValueError(
            f"the tickets of {folder.name!r} are for another backbone: they bring {', '.join(sorted(foreign)[:3])}, "
            "which the model lacks, has tied, or covers with masks."
        )


def _read_ticket(model: RoutedModel, folder: _TicketFolder, entry: Mapping[str, Any], name: str) -> _Ticket:
    tensors = read_tensors(folder.path(entry["file"]))
    if tensors is None:
        raise folder.damaged(entry["file"])
    with folder.reading(entry["file"]):
        masks = decode_mask(entry["coding"]["mask"], tensors["mask"], model.mask_bank)
        added, values = [torch.zeros_like(mask) for mask in masks], torch.empty(0)
        if entry["added"]:
            added = decode_bits(entry["coding"]["added"], tensors["added"], model.mask_bank)
            values = tensors["values"]
    counts = [int(mask.sum()) for mask in added]
    num_kept = sum(int(mask.sum()) for mask in masks)
    if (num_kept, sum(counts), sum(counts)) != (entry["kept"], entry["added"], len(values)) or any(
        (extra & ~mask).any() for extra, mask in zip(added, masks, strict=True)
    ):
        raise folder.damaged(entry["file"])
    statistics, private = _read_rows(model, folder, entry, tensors)
    return _Ticket(name, masks, added, list(values.split(counts)), statistics, private, entry["threshold"])


def _read_rows(
    model: RoutedModel, folder: _TicketFolder, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The ticket's rows of statistics, in the order of the model's buffers, and of private parameters."""
    names, parts = folder.index["private_parameters"], {}
    expected = {**_rows(model, 0), "private": [model.backbone.get_parameter(name) for name in names]}
    for key, rows in expected.items():
        flat, sizes = tensors.get(key, torch.empty(0)), [row.numel() for row in rows]
        if key == "private" and "private_kept" in entry["coding"]:
            coding, coded = entry["coding"]["private_kept"], tensors["private_kept"]
            with folder.reading(entry["file"]):
                parts[key] = iter(decode_rows(coding, coded, [row.shape for row in rows], flat))
            continue
        if len(flat) != sum(sizes):
            raise folder.damaged(entry["file"])
        parts[key] = iter([part.view_as(row) for part, row in zip(flat.split(sizes), rows, strict=True)])
    buffers = [] if model.norm_statistics is None else model.norm_statistics.rows
    keys = ["statistics" if rows.is_floating_point() else "num_batches_tracked" for rows in buffers]
    return [next(parts[key]) for key in keys], dict(zip(names, parts["private"], strict=True))


def _check_same_base(
    model: RoutedModel, folder: _TicketFolder, entries: Sequence[Mapping[str, Any]], tickets: Sequence[_Ticket]
) -> None:
    """Raises `ValueError` unless the model has all that the tickets read of their base, to the bit or rounded."""
    dense = dense_tensors(model)
    known = folder.index["dense"]
    differing = sorted(dense.keys() ^ known.keys())
    differing += [
        name for name in dense if name in known and not matches_fingerprint({name: dense[name]}, known[name])
    ]
    weights = dict(zip(model.mask_bank.weight_names, model.masker.weights, strict=True))
    for entry, ticket in zip(entries, tickets, strict=True):
        for name, mask, added in zip(weights, ticket.masks, ticket.added, strict=True):
            read = _selected(weights[name], mask & ~added)
            if len(read) and name not in differing and not matches_fingerprint({name: read}, entry["in_base"][name]):
                differing.append(name)
    if differing:
        base = folder.index["base"]
        origin = f", which is {base['repo']!r} at revision {base['revision']}," if base.get("repo") else ""
        raise ValueError(
            f"the tickets of {folder.name!r} were made from another base{origin} than this model: of what they read, "
            f"{len(differing)} tensor(s) differ ({', '.join(differing[:5])})."
        )


def _with_added_weights(model: RoutedModel, tickets: Sequence[_Ticket]) -> list[Tensor]:
    """The model's prunable weights with those of the tickets. `ValueError` if another ticket has other values."""
    names, used = model.mask_bank.weight_names, model.mask_bank.union()
    weights = [weight.detach() for weight in model.masker.weights]
    for ticket in tickets:
        for layer, (added, values) in enumerate(zip(ticket.added, ticket.values, strict=True)):
            if not len(values):
                continue
            mask, free = added.to(used[layer].device), ~used[layer]
            values = values.to(weights[layer])
            conflicts = (weights[layer][mask] != values) & ~free[mask]
            if conflicts.any():
                raise ValueError(
                    f"ticket {ticket.name!r} brings {int(conflicts.sum())} weights of {names[layer]} that another "
                    "ticket of this model keeps with other values: they were added to the base independently, and one "
                    "model cannot hold both. Drop the other by `drop_route`, or load this one into a fresh copy."
                )
            weights[layer] = weights[layer].masked_scatter(mask, values)
        used = [one | other.to(one.device) for one, other in zip(used, ticket.masks, strict=True)]
    return weights
