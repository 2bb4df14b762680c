"""The mask bank: the boolean masks of all routes, packed one bit per weight. Knows tensors, but no models."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .hashing import hash_parts


# Row b of `_BITS` holds the eight bits of the byte b, lowest first (as `np.packbits(bitorder="little")`).
_BITS = (torch.arange(256)[:, None] >> torch.arange(8)) & 1

# A weight's mask is applied as a bitwise AND with an integer of the weight's own size, all bits set where it is kept.
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def integer_dtype(dtype: torch.dtype) -> torch.dtype:
    """The signed integer type with the size of the floating point type `dtype`."""
    return _INTEGER_OF_SIZE[dtype.itemsize]


def pack(mask: Tensor) -> Tensor:
    """Packs a `bool` tensor `[...]` of n elements into `uint8 [ceil(n/8)]`; the padding bits are zero."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def _full_row(number: int) -> Tensor:
    """`number` set bits, packed."""
    row = torch.full(((number + 7) // 8,), 0xFF, dtype=torch.uint8)
    row[-1:] >>= -number % 8
    return row


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The `bool` mask of `shape` that `pack` made into `packed`, `uint8 [ceil(n/8)]`."""
    return _look_up(_BITS.to(packed.device, torch.bool), packed, shape)


def unpack_as_integers(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `unpack`, but integers of the size of `dtype`: -1 (all bits set) where kept, 0 elsewhere."""
    return _look_up(-_BITS.to(packed.device, integer_dtype(dtype)), packed, shape)


def _look_up(table: Tensor, packed: Tensor, shape: Sequence[int]) -> Tensor:
    values = table.index_select(0, packed.to(torch.int32)).view(-1)
    return values[: torch.Size(shape).numel()].view(*shape)


def count_bits(packed: Tensor) -> Tensor:
    """Number of set bits over the last dimension of a `uint8` tensor, as `int64`."""
    counts = np.bitwise_count(packed.cpu().numpy()).sum(-1, dtype=np.int64)
    return torch.as_tensor(counts, device=packed.device)


class MaskBank(nn.Module):
    """
    One binary mask per route over an ordered list of weights.

    The masks are persistent `uint8` buffers `m0000, m0001, …`, one per weight in the given order, of shape
    `[num_routes, ceil(num_weights / 8)]`: little bit order, 1 = kept, padding bits zero. A new bank keeps everything.

    A mask of one route is passed as a list of `bool` tensors, one per weight, of the weights' shapes.

    Args:
        weights (`Sequence[tuple[str, Sequence[int]]]`): name and shape of every weight, in order.
        route_names (`Sequence[str]`): one distinct, non-empty name per route.

    Raises:
        ValueError: no route, a name twice, or an empty name.
    """

    def __init__(self, weights: Sequence[tuple[str, Sequence[int]]], route_names: Sequence[str]) -> None:
        super().__init__()
        self.weight_names = [name for name, _ in weights]
        self.shapes = [torch.Size(shape) for _, shape in weights]
        self.route_names = check_route_names(route_names)
        # How often masks were changed through this class. A tensor's own version misses writes in inference mode.
        self.num_changes = 0
        for layer, shape in enumerate(self.shapes):
            self.register_buffer(f"m{layer:04d}", _full_row(shape.numel()).repeat(self.num_routes, 1))

    @classmethod
    def from_masks(cls, weight_names: Sequence[str], masks: dict[str, Sequence[Tensor]]) -> MaskBank:
        """A bank of `masks`: route name -> one `bool` tensor per name in `weight_names`. `ValueError` if none."""
        if not masks:
            raise ValueError("`masks` is empty; a bank needs at least one route.")
        first = next(iter(masks.values()))
        bank = cls(list(zip(weight_names, [mask.shape for mask in first], strict=True)), list(masks))
        for route, mask in masks.items():
            bank[route] = mask
        return bank

    # Reading

    @property
    def num_routes(self) -> int:
        return len(self.route_names)

    @property
    def num_weights(self) -> int:
        """Number of weights that each mask covers."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def packed(self) -> list[Tensor]:
        """The buffers `[num_routes, ceil(n/8)]`, in the order of the weights. No copies."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def route_index(self, route: int | str) -> int:
        """Index of a route given by name or index. Raises `ValueError` if it is unknown, `TypeError` if neither."""
        if isinstance(route, str):
            if route not in self.route_names:
                raise ValueError(f"unknown route {route!r}; the routes are {self._listed()}.")
            return self.route_names.index(route)
        if isinstance(route, bool) or (isinstance(route, Tensor) and route.dtype == torch.bool):
            raise TypeError(f"a route is a name or an index, not {route!r}; the routes are {self._listed()}.")
        try:
            index = operator.index(route)
        except TypeError:
            raise TypeError(f"a route is a name or an index, not a {type(route).__name__}.") from None
        if not 0 <= index < self.num_routes:
            raise ValueError(
                f"route {index} is out of range; allowed are 0 to {self.num_routes - 1}, that is {self._listed()}."
            )
        return index

    def __getitem__(self, route: int | str) -> list[Tensor]:
        """The mask of one route: a list of `bool` tensors of the weights' shapes."""
        index = self.route_index(route)
        return self.unpack(rows[index] for rows in self.packed)

    def union(self) -> list[Tensor]:
        """What at least one ticket keeps: a list of `bool` tensors."""
        return self.unpack(self.packed_union())

    def core(self) -> list[Tensor]:
        """What every ticket keeps: a list of `bool` tensors."""
        return self.unpack(fold(rows, torch.bitwise_and) for rows in self.packed)

    def exclusive(self, route: int | str) -> list[Tensor]:
        """What this ticket keeps and no other does: a list of `bool` tensors."""
        index = self.route_index(route)
        others = self.packed_union([k for k in range(self.num_routes) if k != index])
        return self.unpack(rows[index] & ~row for rows, row in zip(self.packed, others, strict=True))

    def packed_union(self, routes: Sequence[int] | None = None) -> list[Tensor]:
        """The union of the given routes (default all) as packed rows `uint8 [ceil(n/8)]`, one per weight."""
        chosen = (rows if routes is None else rows[list(routes)] for rows in self.packed)
        return [fold(rows, torch.bitwise_or) for rows in chosen]

    def count(self, *, per_layer: bool = False) -> Tensor:
        """Number of kept weights: `int64 [num_routes]`, or `[num_layers, num_routes]` with `per_layer`."""
        counts = torch.stack([count_bits(rows) for rows in self.packed])
        return counts if per_layer else counts.sum(0)

    def density(self, *, per_layer: bool = False) -> Tensor:
        """Kept fraction: `float64 [num_routes]`, or `[num_layers, num_routes]` with `per_layer`."""
        sizes = self._sizes() if per_layer else self.num_weights
        return self.count(per_layer=per_layer).double() / sizes

    def union_count(self) -> int:
        """Number of weights that at least one ticket keeps: the paper's "#Params" (section 4.1)."""
        return sum(int(count_bits(row)) for row in self.packed_union())

    def core_count(self) -> int:
        """Number of weights that every ticket keeps."""
        return sum(int(count_bits(fold(rows, torch.bitwise_and))) for rows in self.packed)

    def intersection_count(self, *, per_layer: bool = False) -> Tensor:
        """
        Number of weights that each pair of tickets both keep: `int64 [num_routes, num_routes]`, or
        `[num_layers, num_routes, num_routes]` with `per_layer`.
        """
        counts = torch.stack([_intersections(rows) for rows in self.packed])
        return counts if per_layer else counts.sum(0)

    def similarity(self, *, per_layer: bool = False) -> Tensor:
        """
        Jaccard similarity of every pair of tickets, |m_i ∩ m_j| / |m_i ∪ m_j| (paper, section 4.4).

        Returns:
            `float64 [num_routes, num_routes]`, or `[num_layers, num_routes, num_routes]` with `per_layer`. NaN where
            both masks are empty.
        """
        intersections, kept = self.intersection_count(per_layer=per_layer), self.count(per_layer=per_layer)
        unions = kept.unsqueeze(-1) + kept.unsqueeze(-2) - intersections
        return intersections.double() / unions

    def chance_similarity(self, *, per_layer: bool = False) -> Tensor:
        """
        The expected Jaccard similarity of independent random masks that keep as many weights in every layer, in the
        shape of `similarity`; see [`expected_similarity`]. The diagonal, too, is for two independent masks.
        """
        kept, sizes = self.count(per_layer=True), self._sizes().view(-1)
        if per_layer:
            kept, sizes = kept.unsqueeze(1), sizes.unsqueeze(1)  # every layer by itself
        return expected_similarity(kept, sizes)[0]

    def fingerprint(self) -> str:
        """SHA-256 over the number of routes and, for each weight in order, its name, shape and packed masks."""
        layers = zip(self.weight_names, self.shapes, self.packed, strict=True)
        parts = [(f"|{name}|{tuple(shape)}|", rows) for name, shape, rows in layers]
        return hash_parts([(f"{self.num_routes}{parts[0][0]}", parts[0][1]), *parts[1:]])

    # Changing

    def __setitem__(self, route: int | str, masks: Sequence[Tensor]) -> None:
        """Replaces the mask of one route. Raises `ValueError`, and changes nothing, unless all of `masks` fit."""
        self.set_packed(route, self.pack(masks))

    def set_packed(self, route: int | str, packed: Sequence[Tensor]) -> None:
        """Replaces the mask of one route by packed rows, `uint8 [ceil(n/8)]`, one per weight, as `pack` gives them."""
        index = self.route_index(route)
        for rows, row in zip(self.packed, packed, strict=True):
            rows[index].copy_(row)
        self.num_changes += 1

    def add_route(self, name: str, masks: Sequence[Tensor]) -> None:
        """Appends a route. Raises `ValueError` if its name is taken or its mask does not fit."""
        names = check_route_names([*self.route_names, name])
        parts = zip(self.packed, self.pack(masks), strict=True)
        self._replace(names, [torch.cat([rows, row[None].to(rows.device)]) for rows, row in parts])

    def drop_route(self, route: int | str) -> None:
        """Removes a route; later ones move up by one. Raises `ValueError` if it is unknown or the only one."""
        index = self.route_index(route)
        if self.num_routes == 1:
            raise ValueError("a bank needs at least one route; this would remove the last.")
        self._select([k for k in range(self.num_routes) if k != index])

    def reorder(self, routes: Sequence[int | str]) -> None:
        """Puts the routes into the given order. Raises `ValueError` unless it names each of them once."""
        order = [self.route_index(route) for route in routes]
        if sorted(order) != list(range(self.num_routes)):
            raise ValueError(f"`routes` must name each of {self._listed()} once, got {list(routes)}.")
        self._select(order)

    def rename_route(self, route: int | str, name: str) -> None:
        """Gives a route another name. Raises `ValueError` if the route is unknown, or the name taken or empty."""
        index = self.route_index(route)
        self.route_names = check_route_names([*self.route_names[:index], name, *self.route_names[index + 1 :]])

    def validate(self, fingerprint: str | None = None) -> None:
        """
        Checks type, shapes and padding of the stored masks and, if given, their fingerprint.

        Raises:
            ValueError: the stored masks are wrong; the message says which buffer and how.
        """
        for layer, (shape, rows) in enumerate(zip(self.shapes, self.packed, strict=True)):
            expected = (self.num_routes, -(-shape.numel() // 8))
            if rows.dtype != torch.uint8 or tuple(rows.shape) != expected:
                raise ValueError(
                    f"mask buffer m{layer:04d} ({self.weight_names[layer]}) is {rows.dtype} {tuple(rows.shape)}, "
                    f"expected torch.uint8 {expected}."
                )
            if shape.numel() % 8 and int((rows[:, -1] >> (shape.numel() % 8)).max()):
                raise ValueError(f"mask buffer m{layer:04d} ({self.weight_names[layer]}) has padding bits set.")
        if fingerprint is not None and fingerprint != self.fingerprint():
            raise ValueError(
                f"the masks have the fingerprint {self.fingerprint()[:16]}…, but `mask_fingerprint` of the "
                f"configuration is {fingerprint[:16]}…: the masks belong to another model or the file is damaged."
            )

    def extra_repr(self) -> str:
        return f"num_routes={self.num_routes}, num_layers={len(self.shapes)}, num_weights={self.num_weights}"

    def _listed(self) -> str:
        return ", ".join(map(repr, self.route_names))

    def _sizes(self) -> Tensor:
        return torch.tensor([[shape.numel()] for shape in self.shapes], device=self.packed[0].device)

    def check_masks(self, masks: Sequence[Tensor]) -> None:
        """Raises `ValueError` unless `masks` are one `bool` tensor per weight, of its shape."""
        if len(masks) != len(self.shapes):
            raise ValueError(f"`masks` has {len(masks)} tensors, expected {len(self.shapes)}, one per weight.")
        for name, shape, mask in zip(self.weight_names, self.shapes, masks, strict=True):
            if mask.dtype != torch.bool or mask.shape != shape:
                raise ValueError(
                    f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(shape)}."
                )

    def fits(self, packed: Sequence[Tensor]) -> bool:
        """Whether packed rows are as `pack` makes them: `uint8 [ceil(n/8)]`, one per weight, padding bits zero."""
        sizes = [shape.numel() for shape in self.shapes]
        if [(row.dtype, tuple(row.shape)) for row in packed] != [(torch.uint8, (-(-size // 8),)) for size in sizes]:
            return False
        return not any(size % 8 and int(row[-1]) >> size % 8 for row, size in zip(packed, sizes, strict=True))

    def pack(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The packed rows of a mask, `uint8 [ceil(n/8)]`, one per weight. Raises `ValueError` unless it fits."""
        self.check_masks(masks)
        return [pack(mask) for mask in masks]

    def unpack(self, packed: Iterable[Tensor]) -> list[Tensor]:
        """The mask of packed rows: `bool` tensors of the weights' shapes."""
        return [unpack(row, shape) for row, shape in zip(packed, self.shapes, strict=True)]

    def _select(self, order: Sequence[int]) -> None:
        """Keeps the routes with these indices, in this order."""
        self._replace([self.route_names[k] for k in order], [rows[order] for rows in self.packed])

    def _replace(self, route_names: list[str], packed: Sequence[Tensor]) -> None:
        self.route_names = route_names
        for layer, rows in enumerate(packed):
            setattr(self, f"m{layer:04d}", rows)
        self.num_changes += 1


def expected_similarity(kept: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """
    Mean and variance of the Jaccard similarity, over all weights together, of independent random masks that keep as
    many weights in each layer as the given ones.

    This is the chance level for tickets of global magnitude pruning: layers differ in density, similarly in all
    tickets, so even with shuffled layers tickets are more similar than uniformly random masks of the same total.

    With X = Σ X_l, the X_l hypergeometric and independent, μ = Σ a_l b_l / n_l and σ² = Σ a_l b_l (n_l - a_l)
    (n_l - b_l) / (n_l² (n_l - 1)) are the mean and variance of X. The similarity is g(X) = X / (S - X) with
    S = Σ (a_l + b_l), so to second order its mean is g(μ) + σ² S / (S - μ)³ and its variance (σ S / (S - μ)²)². The
    error is of order n^-2, below 1e-4 from about a hundred kept weights on.

    Args:
        kept (`Tensor`): `[..., L, K]`, weights that each of K masks keeps in each of L layers.
        sizes (`Tensor`): `[..., L]`, weights of each layer.

    Returns:
        Two tensors `float64 [..., K, K]`; NaN where both masks keep nothing. The diagonal, too, is for random masks.
    """
    kept, size = kept.double(), sizes.double().clamp(min=1).unsqueeze(-1)
    mean = _products(kept, 1 / size)
    variance = _products(kept * (size - kept), 1 / (size.square() * (size - 1).clamp(min=1)))
    total = kept.sum(-2)
    total = total.unsqueeze(-1) + total.unsqueeze(-2)
    union = total - mean
    return mean / union + variance * total / union**3, variance * (total / union.square()).square()


def _products(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over layers of the products of all pairs: `[..., L, K]` and `[..., L, 1]` -> `[..., K, K]`."""
    products = (values * weights).transpose(-1, -2) @ values
    return (products + products.transpose(-1, -2)) / 2  # the same for (i, j) and (j, i), to the bit


def check_route_names(names: Sequence[str]) -> list[str]:
    """`names` as a list. Raises `ValueError` unless there is at least one, and all are non-empty and distinct."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ValueError(f"`route_names` must be a list of non-empty strings, got {names!r}.")
    if not names:
        raise ValueError("`route_names` is empty; at least one route is needed.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`route_names` has {', '.join(map(repr, twice))} more than once; names must be distinct.")
    return list(names)


def fold(rows: Tensor, combine) -> Tensor:
    """Combines `uint8 [K, bytes]` over its routes; zeros for K = 0."""
    result = rows[0].clone() if len(rows) else rows.new_zeros(rows.shape[1:])
    for row in rows[1:]:
        combine(result, row, out=result)
    return result


def byte_blocks(num_bytes: int, num_routes: int) -> Iterator[slice]:
    """Slices over the bytes of a layer, small enough that a block of all routes stays in the processor's cache."""
    size = max(8, 2**18 // num_routes // 8 * 8)
    return (slice(start, start + size) for start in range(0, num_bytes, size))


def _intersections(rows: Tensor) -> Tensor:
    """`int64 [K, K]`: kept weights that each pair of packed rows shares."""
    num_routes, packed = len(rows), rows.cpu().numpy()
    upper = np.zeros((num_routes, num_routes), np.int64)
    for block in byte_blocks(packed.shape[1], num_routes):
        # Words of eight bytes are counted faster than single ones.
        words = np.pad(packed[:, block], ((0, 0), (0, -packed[:, block].shape[1] % 8))).view(np.uint64)
        for route in range(num_routes):
            upper[route, route:] += np.bitwise_count(words[route:] & words[route]).sum(1, dtype=np.int64)
    return torch.from_numpy(upper + np.triu(upper, 1).T).to(rows.device)
