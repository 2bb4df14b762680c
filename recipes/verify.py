"""
Check the claims that the table of a finished run rests on, from its files, with NumPy and safetensors alone.

    python recipes/verify.py runs/digits

Every route's density is exact to the weight. Masks are nested over all prune events. No two tickets are equal. Every
training started from the initial weights, masked for extraction, to the bit. If the run had that control, membership
tickets fail on samples of the wrong route. Prints one line per check, and exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file


# A control of recipes/prune.py --sanity, which only membership tickets have.
SHIFTED = "routes shifted by one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of recipes/prune.py")
    parser.add_argument("--results", type=Path, help="results file, if it was moved out of the folder")
    arguments = parser.parse_args()
    run = arguments.run
    results = json.loads((arguments.results or run / "results.json").read_text())
    theta0 = load_file(run / "theta0.safetensors")
    config = json.loads((run / "final" / "config.json").read_text())
    weights = [(name, tuple(shape)) for name, shape in config["prunable"]]
    checks = {
        "densities exact to the weight": densities(run, results, weights),
        "masks nested over all events": nested(run),
        "pairwise Jaccard below 1": distinct(run, results),
        "every training started from the masked initial weights": rewound(run, results, theta0, weights),
    }
    if any(report["method"] == SHIFTED for report in results["controls"]):
        checks["tickets of the wrong route below .60 balanced accuracy"] = shifted(results)
    for name, problems in checks.items():
        print(f"{'FAILED' if problems else 'ok':7} {name}{': ' + '; '.join(problems[:3]) if problems else ''}")
    sys.exit(any(checks.values()))


def densities(run: Path, results: dict, weights: list) -> list[str]:
    """
    Routes of the saved models that do not keep exactly n - round(s n) of n weights, at sparsity s; where units were
    removed, what the report says.
    """
    num_weights = sum(int(np.prod(shape)) for _, shape in weights)
    problems = []
    for report in results["rounds"]:
        exact = [num_weights - round(report["sparsity"] * num_weights)] * len(report["kept"])
        counts = list(report["kept"].values()) if "units" in report else exact
        for route, mask in enumerate(packed_masks(run / report["folder"])):
            kept, expected = int(np.unpackbits(mask).sum()), counts[route]
            if kept != expected:
                problems.append(f"{report['folder']} route {route} keeps {kept} of {expected}")
    return problems


def nested(run: Path) -> list[str]:
    """Files of prune events that brought a pruned weight back."""
    problems = []
    for route in routes(run):
        before = None
        for file in events(run, route):
            masks = [bits for _, bits in sorted(load_file(file).items())]
            if before is not None and any((new & ~old).any() for new, old in zip(masks, before, strict=True)):
                problems.append(str(file.relative_to(run)))
            before = masks
    return problems


def distinct(run: Path, results: dict) -> list[str]:
    """Pairs of routes of a saved model with the same mask."""
    problems = []
    for report in results["rounds"]:
        masks = packed_masks(run / report["folder"])
        for first, second in combinations(range(len(masks)), 2):
            if (masks[first] == masks[second]).all():
                problems.append(f"{report['folder']} routes {first} and {second}")
    return problems


def rewound(run: Path, results: dict, theta0: dict, weights: list) -> list[str]:
    """Trainings whose recorded start is not where(mask, θ0, 0), or not θ0 for joint retraining."""
    problems = [report["folder"] for report in results["rounds"] if report["started_from"] != digest(theta0)]
    for route in routes(run):
        masks = {name: np.ones(shape, dtype=bool) for name, shape in weights}
        for file in events(run, route):
            expected = digest(
                {name: np.where(masks[name], v, v.dtype.type(0)) if name in masks else v for name, v in theta0.items()}
            )
            with safe_open(file, framework="numpy") as opened:
                if json.loads(opened.metadata()["hf_rtl"])["started_from"] != expected:
                    problems.append(str(file.relative_to(run)))
            packed = load_file(file)
            for (name, shape), row in zip(weights, (packed[key] for key in sorted(packed)), strict=True):
                bits = np.unpackbits(row, bitorder="little")[: int(np.prod(shape))]
                masks[name] = bits.reshape(shape).astype(bool)
    return problems


def shifted(results: dict) -> list[str]:
    """Rounds in which tickets reach .60 balanced accuracy on the samples of the neighbouring route."""
    return [
        f"sparsity {report['sparsity']}: {report['metrics']['balanced_accuracy']:.3f}"
        for report in results["controls"]
        if report["method"] == SHIFTED and report["metrics"]["balanced_accuracy"] >= 0.6
    ]


def packed_masks(folder: Path) -> np.ndarray:
    """The masks of a saved model as bits, `uint8 [routes, bytes]`."""
    tensors = load_file(folder / "model.safetensors")
    return np.concatenate([tensors[name] for name in sorted(tensors) if name.startswith("mask_bank.")], axis=1)


def routes(run: Path) -> list[str]:
    return sorted({file.name for file in (run / "extraction").glob("event-*/route-*.safetensors")})


def events(run: Path, route: str) -> list[Path]:
    return sorted((run / "extraction").glob(f"event-*/{route}"))


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, torch types, shapes and bytes, in the order of the names."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape)
        result.update(f"{name}|torch.{tensor.dtype}|{tensor.shape}|".encode())
        result.update(tensor.tobytes())
    return result.hexdigest()


if __name__ == "__main__":
    main()
