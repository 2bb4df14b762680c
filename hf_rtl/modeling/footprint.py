"""What a routed model costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .mask_bank import count_bits
from .mask_coding import encode_mask, encode_rows
from .model_file import coded_masks
from .norm_statistics import tracked_buffers
from .offloading import refuse_offloaded
from .routed_model import RoutedModel


# Keys of `footprint` -> what the bytes hold; {} stands for the number of routes.
FOOTPRINT_FORMS = {
    "full_bytes": "files as `save_pretrained` writes them: all weights, masks as raw bits",
    "compact_bytes": "files of `compact=True`: weights that at least one ticket keeps, masks coded",
    "total_bytes": "all tickets with masks as raw bits: the sum of the three lines below",
    "union_bytes": "weights that at least one ticket keeps",
    "mask_bytes": "masks, as raw bits",
    "dense_bytes": "what no mask covers, with every route's statistics",
    "coded_mask_bytes": "masks, coded as in the files of `compact=True`",
    "tickets_bytes": "ticket files of all routes, for those who have the weights",
    "independent_full_bytes": "{} independent models: plain networks, one per route",
    "independent_bytes": "{} independent models of their kept weights, and a mask as raw bits",
    "independent_compact_bytes": "{} independent models of their kept weights, and a coded mask",
}


def human_bytes(num_bytes: int) -> str:
    """A number of bytes as text, in decimal units with three digits."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def footprint(model: RoutedModel) -> dict[str, int]:
    """
    Bytes of the tensors of a routed model in every form, and of K models of one ticket each. The headers of files add
    a few kilobytes.

    Returns:
        What the tickets need:
        - `union_bytes`: weights that at least one ticket keeps;
        - `mask_bytes`, `coded_mask_bytes`: masks as raw bits, and as the compact form has them;
        - `dense_bytes`: what no mask covers, that is the other parameters and buffers, the statistics and private
          parameters of all routes, and the router;
        - `total_bytes`: union, raw masks and dense.

        What files hold:
        - `full_bytes`: the files of `save_pretrained`;
        - `compact_bytes`: the files of `save_pretrained(compact=True)`;
        - `tickets_bytes`: the ticket files of all routes, for use with a copy of the weights.
        Both have masks in a bit per unit where whole units are removed, and no zeros of private parameters for these.

        One model per route instead, each with its own dense part:
        - `independent_full_bytes`: plain models, as `extract_ticket` gives them;
        - `independent_bytes`, `independent_compact_bytes`: their kept weights with a mask as raw bits, or coded.

    Raises:
        RuntimeError: parameters are offloaded.
    """
    refuse_offloaded(model, "footprint()")
    bank, weights, private = model.mask_bank, model.masker.weights, model.private_parameters
    # A tied tensor has several names but is saved once.
    saved = {tensor.data_ptr(): tensor.nbytes for tensor in model.backbone.state_dict().values()}
    num_bytes = sum(saved.values())
    prunable = sum(weight.nbytes for weight in weights)
    private_rows = sum(rows.nbytes for rows in private.rows)
    compact_rows = _bytes_without_zeros([row for rows in private.rows for row in rows])
    rows_alone = sum(_bytes_without_zeros(private.row(route)) for route in range(bank.num_routes))
    replaced = sum(own.nbytes for own in private.own(model.backbone))
    rows = 0
    if model.norm_statistics is not None:
        rows = sum(rows.nbytes for rows in model.norm_statistics.rows)
        replaced += sum(module.get_buffer(name).nbytes for module, name in tracked_buffers(model.backbone))
    rows_of_routes = rows * bank.num_routes // (bank.num_routes + 1)
    routing = 0 if model.router is None else sum(tensor.nbytes for tensor in model.router.buffers())

    kept_by_any = [int(count_bits(row)) for row in bank.packed_union()]
    kept_in_all_tickets = bank.count(per_layer=True).sum(1).tolist()
    union = sum(count * weight.itemsize for count, weight in zip(kept_by_any, weights, strict=True))
    tickets = sum(count * weight.itemsize for count, weight in zip(kept_in_all_tickets, weights, strict=True))
    masks = sum(packed.nbytes for packed in bank.packed)
    coded = sum(tensor.nbytes for tensor in coded_masks(bank)[1].values()) or masks
    alone = sum(encode_mask(bank, route)[1].nbytes for route in range(bank.num_routes))

    others = num_bytes - prunable
    dense = others + rows + private_rows + routing - replaced
    return {
        "union_bytes": union,
        "mask_bytes": masks,
        "coded_mask_bytes": coded,
        "dense_bytes": dense,
        "total_bytes": union + masks + dense,
        "full_bytes": num_bytes + masks + rows + private_rows + routing,
        "compact_bytes": union + coded + others + rows + compact_rows + routing,
        "tickets_bytes": alone + rows_of_routes + rows_alone,
        "independent_full_bytes": bank.num_routes * num_bytes,
        "independent_bytes": tickets + masks + bank.num_routes * others,
        "independent_compact_bytes": tickets + alone + bank.num_routes * others,
    }


def _bytes_without_zeros(rows: Sequence[Tensor]) -> int:
    """Bytes of rows of private parameters in files, which leave out zeros for removed units."""
    kept = encode_rows(rows)
    return sum(row.nbytes for row in rows) if kept is None else kept.nbytes
