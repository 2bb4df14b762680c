"""The directory of a training run: what is in it, how it is written, and whether it fits a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .mask_bank import pack, unpack


class RunDirectory:
    """
    ```
    run.json                                    configuration, versions, hashes
    theta0.safetensors                          what every event and every joint retraining starts from
    extraction/extraction.json                  the part of the configuration that decides the masks
    extraction/event-NNN/route-KKK.safetensors  the mask of a route after a prune event
    round-NN-sparsity-S/                        a complete model, with that round's Trainer checkpoints inside
    final/                                      the last round's model
    ```
    A file that exists under its name is whole: files are written beside and then renamed. Tensor files carry a hash of
    their content, so a damaged one is found and its work done again.
    """

    def __init__(self, path: str | os.PathLike, extraction_path: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self.extraction_path = self.path / "extraction" if extraction_path is None else Path(extraction_path)

    def mask_file(self, event: int, route: int) -> Path:
        return self.extraction_path / f"event-{event:03d}" / f"route-{route:03d}.safetensors"

    @property
    def theta0_file(self) -> Path:
        return self.path / "theta0.safetensors"

    @property
    def final_folder(self) -> Path:
        return self.path / "final"

    def open(
        self, configuration: Mapping[str, Any], extraction: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """
        Starts a run in this directory, or continues the one that is there.

        Raises:
            ValueError: a run, or extracted masks, of another configuration are there; says which values differ.
        """
        files = {
            self.path / "run.json": {"configuration": configuration, "versions": versions},
            self.extraction_path / "extraction.json": {"configuration": extraction},
        }
        for file, content in files.items():
            if file.exists():
                _check_same(file, json.loads(json.dumps(content["configuration"])))
        for file, content in files.items():
            if not file.exists():
                write_json(file, content)

    def save_masks(self, event: int, route: int, masks: Sequence[Tensor], *, started_from: str = "") -> None:
        """Writes a route's mask after an event, with the hash of what its training started from."""
        tensors = {f"m{layer:04d}": pack(mask.cpu()) for layer, mask in enumerate(masks)}
        write_tensors(self.mask_file(event, route), tensors, started_from=started_from)

    def load_masks(self, event: int, route: int, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """The mask that `save_masks` wrote, `None` if there is none or it is damaged."""
        tensors = read_tensors(self.mask_file(event, route))
        if tensors is None:
            return None
        return [unpack(tensors[f"m{layer:04d}"], shape) for layer, shape in enumerate(shapes)]


def _check_same(file: Path, current: dict[str, Any]) -> None:
    saved = json.loads(file.read_text())["configuration"]
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if differing:
        listed = "; ".join(
            f"{name}: {_short(saved.get(name))} there, {_short(current.get(name))} now" for name in differing
        )
        raise ValueError(
            f"{str(file.parent)!r} holds a run of another configuration ({listed}). Choose another `output_dir` or "
            "`extraction_dir`, or give the same arguments to continue that run."
        )


def write_json(file: Path, value: Any) -> None:
    """Writes JSON so that `file` is either as it was or whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(file)
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, file)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes tensors with a hash of their content and `metadata`, so that `file` is either as it was or whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    beside = _beside(file)
    save_file(contiguous, beside, metadata={**metadata, "sha256": hash_tensors(contiguous)})
    os.replace(beside, file)


def read_tensors(file: Path) -> dict[str, Tensor] | None:
    """The tensors that `write_tensors` wrote; `None` if the file is missing, torn or altered."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            expected = (opened.metadata() or {}).get("sha256")
    except (FileNotFoundError, SafetensorError):
        return None
    return tensors if expected == hash_tensors(tensors) else None


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.tmp")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
