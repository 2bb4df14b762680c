"""What a routed model costs in bytes."""

from __future__ import annotations

from torch import nn

from .mask_bank import MaskBank, count_bits
from .norm_statistics import NormStatistics, tracked_buffers
from .prunable import parameter_aliases, parameter_at


def footprint(backbone: nn.Module, bank: MaskBank, statistics: NormStatistics | None) -> dict[str, int]:
    """
    Bytes of a routed model in its smallest lossless form, and of one pruned model per route.

    Returns:
        `union_bytes`: weights that any ticket keeps; `mask_bytes`: masks as raw bits; `dense_bytes`: what no mask
        covers, that is the other parameters and buffers, and the statistics of all routes; `total_bytes`: their sum;
        `independent_bytes`: the same for K models of one ticket each, every one with its own mask and dense part.
    """
    aliases = parameter_aliases(backbone)
    weights = [parameter_at(aliases[name][0]) for name in bank.weight_names]
    kept_by_any = [int(count_bits(row)) for row in bank.packed_union()]
    kept_in_all_tickets = bank.count(per_layer=True).sum(1).tolist()
    masks = sum(rows.nbytes for rows in bank.packed)
    prunable = {id(weight) for weight in weights}
    parameters = sum(parameter.nbytes for parameter in backbone.parameters() if id(parameter) not in prunable)
    buffers = sum(buffer.nbytes for buffer in backbone.buffers())
    tracked = sum(module.get_buffer(name).nbytes for module, name in tracked_buffers(backbone))
    per_route = tracked if statistics is None else sum(rows.nbytes for rows in statistics.rows)
    union = sum(count * weight.itemsize for count, weight in zip(kept_by_any, weights, strict=True))
    tickets = sum(count * weight.itemsize for count, weight in zip(kept_in_all_tickets, weights, strict=True))
    dense = parameters + buffers - tracked + per_route
    return {
        "union_bytes": union,
        "mask_bytes": masks,
        "dense_bytes": dense,
        "total_bytes": union + masks + dense,
        "independent_bytes": tickets + masks + bank.num_routes * (parameters + buffers),
    }
