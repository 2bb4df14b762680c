"""`hf-rtl export`: writes one ticket as a plain model."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ImageProcessingMixin, PreTrainedModel

from hf_rtl.modeling.footprint import human_bytes
from hf_rtl.modeling.image_processing import configured_shape, processed_shape
from hf_rtl.modeling.standalone import make_example_inputs

from .models import PROCESSOR_FILES, check_free, copy_beside, load_model, written_model
from .tables import printable


_ONNX_LIMIT = 2 * 10**9  # bytes; larger weights are written into a second file beside the ONNX file


def run(args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.out)
    check_free(out, force=args.force)
    if out.is_dir() and Path(args.model).is_dir() and out.samefile(args.model):
        raise ValueError(f"{args.out!r} is the folder of the model itself, which the ticket would overwrite.")
    if args.prune_structure and args.format == "folder":
        raise ValueError(
            "--prune-structure makes tensors smaller than the configuration says, so no folder of them can be loaded; "
            "add --format torch-export or --format onnx."
        )
    if args.format == "onnx" and not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")):
        raise ValueError("--format onnx needs two more packages: pip install onnx onnxscript")
    model = load_model(args.model, revision=args.revision, token=args.token)
    model.mask_bank.route_index(args.route)
    inputs = _example_inputs(args, model.backbone) if args.input or args.format != "folder" else None
    ticket = model.extract_ticket(
        args.route, prune_structure=args.prune_structure, small=args.small, example_inputs=inputs
    ).eval()
    with written_model(out) as staging:
        copy_beside(args.model, staging, PROCESSOR_FILES, revision=args.revision, token=args.token)
        if inputs is None:
            ticket.save_pretrained(staging)
        else:
            ticket.config.save_pretrained(staging)
            _export(ticket, inputs, staging, args.format)
        files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    return {
        "folder": str(out),
        "route": args.route,
        "format": args.format,
        "inputs": {} if inputs is None else {name: _fixed_sizes(tensor) for name, tensor in inputs.items()},
        "class": type(ticket).__name__,
        "num_parameters": ticket.num_parameters(),
        "num_parameters_before": model.backbone.num_parameters(),
        "files": files,
    }


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    total = human_bytes(sum(values["files"].values()))
    before = values["num_parameters_before"]
    smaller = f" of {before:,}" if values["num_parameters"] != before else ""
    lines = [
        f"Ticket {printable(values['route'])!r} is in {values['folder']}: {values['class']}, "
        f"{values['num_parameters']:,}{smaller} parameters, {total}."
    ]
    for name, sizes in values["inputs"].items():
        lines.append(f"Its graph takes {name} [{', '.join('any' if size is None else str(size) for size in sizes)}].")
    return "\n".join(lines)


def _example_inputs(args: argparse.Namespace, backbone: PreTrainedModel) -> dict[str, Tensor]:
    """
    Inputs of the given shapes, by default images as the processor beside the model makes them, or inputs of shapes
    that the backbone takes; in its floating point dtype.
    """
    name = backbone.main_input_name
    if args.input:
        inputs = dict(map(_input, args.input))
    elif name == "pixel_values":
        made = processed_shape(_processor_settings(args))
        shape = [size or own for size, own in zip(made, configured_shape(backbone), strict=True)]
        inputs = {name: torch.randn(2, *shape)}
    else:
        try:
            inputs = make_example_inputs(backbone)
        except ValueError:
            raise ValueError(
                f"{type(backbone).__name__} does not define its input size: add for example --input {name}=2x16000"
            ) from None
    return {name: x.to(backbone.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _processor_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the image processor beside the model; none without one."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(args.model, revision=args.revision, token=args.token)[0]
    except OSError:
        return {}


def _fixed_sizes(tensor: Tensor) -> list[int | None]:
    """The sizes of a graph input, `None` where any size will do: the batch, and every size of tokens."""
    return [size if number and tensor.is_floating_point() else None for number, size in enumerate(tensor.shape)]


def _input(given: str) -> tuple[str, Tensor]:
    name, _, sizes = given.partition("=")
    try:
        shape = [int(size) for size in sizes.split("x")]
        if min(shape) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--input {given} must be NAME=SIZExSIZE…, for example --input pixel_values=2x3x32x32"
        ) from None
    whole = name.endswith(("_ids", "_mask"))
    return name, torch.ones(shape, dtype=torch.long) if whole else torch.randn(shape)


def _export(ticket: PreTrainedModel, inputs: Mapping[str, Tensor], folder: Path, kind: str) -> None:
    """Writes the graph of `ticket`, for any batch size and any number of tokens."""
    ticket.config.use_cache = False
    module = _PlainOutputs(ticket).eval()
    sizes = {
        name: {number: torch.export.Dim.AUTO for number, size in enumerate(_fixed_sizes(tensor)) if size is None}
        for name, tensor in inputs.items()
    }
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                (),
                dict(inputs),
                dynamic_shapes={"inputs": sizes},
                strict=False,
                # torch 2.14 writes guards on free sizes with names that are unknown where the guards are checked.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            names = list(program.module()(**inputs))
        if kind == "torch-export":
            torch.export.save(program, folder / "model.pt2")
        else:
            onnx = torch.onnx.export(program, output_names=names, verbose=False)
            assert onnx is not None
            size = sum(tensor.nbytes for tensor in ticket.state_dict().values())
            onnx.save(folder / "model.onnx", external_data=size > _ONNX_LIMIT)
    except RuntimeError as error:
        # torch's error has many lines of advice; the first one is the reason.
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"torch cannot export {type(ticket).__name__} with --format {kind}: {reason}") from error


class _PlainOutputs(nn.Module):
    """Returns a plain dict of tensors, so that loading an exported graph does not need transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.model(**inputs)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
