"""Bytes of a model: counted by hand, and those of the files."""

import math
import zlib

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import nn

from hf_rtl import RTLModelForImageClassification, RTLModelForSequenceClassification


ROUTES = {"route_names": ["x", "y"], "ticket_task": "labels", "num_labels": 3, "seed": 0}


def bytes_in(folder):
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def deflated(bits):
    """The size in bytes of a mask by deflate of numpy and zlib, or of its bits if that is less."""
    data = np.packbits(bits, bitorder="little").tobytes()
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return min(len(data), len(deflater.compress(data) + deflater.flush()))


@pytest.mark.parametrize("norm_statistics", ["per_route", "shared"])
def test_every_form_against_brute_force(fill_masks, norm_statistics):
    model = RTLModelForImageClassification.from_backbone("test_resnet", norm_statistics=norm_statistics, **ROUTES)
    masks = fill_masks(model, keep=0.1)
    shapes = model.mask_bank.shapes
    assert all(math.prod(shape) % 8 == 0 for shape in shapes)  # Otherwise, padding between layers would count.
    flat = [np.concatenate([mask.numpy().ravel() for mask in route]) for route in masks]
    mask_bytes = 2 * len(flat[0]) // 8
    rest = 4 * sum(p.numel() for p in model.backbone.parameters()) - 4 * len(flat[0])
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    own = sum(2 * 4 * norm.num_features + 8 for norm in norms)
    rows = 3 * own if norm_statistics == "per_route" else 0
    used = rows or own
    union = flat[0] | flat[1]
    in_union = np.stack([flat[0][union], flat[1][union], *np.zeros((6, union.sum()), bool)], axis=1)
    coded = min(mask_bytes, deflated(union) + deflated(in_union))
    alone = deflated(flat[0]) + deflated(flat[1])
    kept = 4 * int(flat[0].sum() + flat[1].sum())
    assert coded < mask_bytes and alone < mask_bytes
    assert model.footprint() == {
        "union_bytes": 4 * union.sum(),
        "mask_bytes": mask_bytes,
        "coded_mask_bytes": coded,
        "dense_bytes": rest + used,
        "total_bytes": 4 * union.sum() + mask_bytes + rest + used,
        "full_bytes": 4 * len(union) + mask_bytes + rest + own + rows,
        "compact_bytes": 4 * union.sum() + coded + rest + own + rows,
        "tickets_bytes": alone + 2 * rows // 3,
        "independent_full_bytes": 2 * (4 * len(union) + rest + own),
        "independent_bytes": kept + mask_bytes + 2 * (rest + own),
        "independent_compact_bytes": kept + alone + 2 * (rest + own),
    }


@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("backbone", ["test_resnet", "bert"])
def test_files_have_the_bytes_that_are_said(fill_masks, tiny_bert_config, backbone, keep, tmp_path):
    if backbone == "bert":
        model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    else:
        model = RTLModelForImageClassification.from_backbone(backbone, **ROUTES)
    fill_masks(model, keep=keep)
    footprint = model.footprint()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "compact", compact=True)
    model.save_tickets(tmp_path / "tickets")
    assert bytes_in(tmp_path / "full") == footprint["full_bytes"]
    assert bytes_in(tmp_path / "compact") == footprint["compact_bytes"]
    assert bytes_in(tmp_path / "tickets") == footprint["tickets_bytes"]
    plain = 0
    for route in model.route_names:
        model.extract_ticket(route).save_pretrained(tmp_path / route)
        plain += bytes_in(tmp_path / route)
    assert plain == footprint["independent_full_bytes"]
