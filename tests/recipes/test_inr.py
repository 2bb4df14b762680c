"""Implicit neural representations: reading scenes, PSNR, and the recipe on two tiny images."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import inr
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from shared.scene_data import Pixels, Scene, SceneArguments, clean_regions, encode_regions, load_scenes
from shared.scene_report import psnr


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def two_images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> image `uint8 [H, W, 3]` and regions `uint8 [H, W]`."""
    generator = np.random.default_rng(0)
    halves = np.zeros((6, 8), dtype=np.uint8)
    halves[:, 3:] = 4
    thirds = np.repeat(np.array([1, 2, 7], dtype=np.uint8), 3)[:, None].repeat(5, axis=1)
    pictures = {"halves": halves, "thirds": thirds}
    return {
        name: (generator.integers(0, 256, (*regions.shape, 3), dtype=np.uint8), regions)
        for name, regions in pictures.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for name, (image, regions) in two_images().items():
        (folder / f"{name}.png").write_bytes(png(image))
        (folder / f"{name}.regions.png").write_bytes(png(regions))
    return folder


# PSNR


def test_psnr_of_known_answers() -> None:
    target = np.full((50, 3), 0.5, dtype=np.float32)
    assert psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)
    assert psnr(target - 0.01, target) == pytest.approx(40, abs=1e-3)
    assert psnr(target, target) == math.inf
    # One channel of one of 50 pixels is wrong by 1: the mean is over pixels and channels.
    black, spot = np.zeros((50, 3), dtype=np.float32), np.zeros((50, 3), dtype=np.float32)
    spot[7, 1] = 1
    assert psnr(spot, black) == pytest.approx(10 * math.log10(150))
    # Values outside [0, 1] are clamped, and so are no error.
    assert psnr(spot - 3 * (1 - spot), spot) == math.inf


# Scenes


def test_stray_and_unlabelled_pixels_get_the_nearest_region() -> None:
    planted = np.array(
        [
            [1, 1, 1, 1, 2, 2, 2, 2],
            [1, 9, 1, 0, 2, 2, 2, 2],
            [1, 1, 1, 1, 0, 2, 2, 2],
            [1, 1, 1, 1, 2, 2, 2, 3],
        ]
    )
    cleaned = clean_regions(planted, unlabelled=0, smallest=0.1)
    expected = planted.copy()
    for y, x in np.argwhere(np.isin(planted, [0, 3, 9])):
        distances = {(j, i): (j - y) ** 2 + (i - x) ** 2 for j, i in np.argwhere(np.isin(planted, [1, 2])).tolist()}
        nearest = [place for place, distance in distances.items() if distance == min(distances.values())]
        allowed = {int(planted[place]) for place in nearest}
        assert int(cleaned[y, x]) in allowed
        expected[y, x] = cleaned[y, x]
    assert np.array_equal(cleaned, expected)
    assert cleaned[1, 1] == 1 and cleaned[3, 7] == 2
    # 0 is a region like the others unless it means unlabelled; regions that are large enough stay.
    assert np.array_equal(clean_regions(planted, unlabelled=None, smallest=0.0), planted)
    assert set(np.unique(clean_regions(planted, unlabelled=None, smallest=2 / 32))) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"no region has 90.0% of the image, the least that --smallest_region keeps"):
        clean_regions(planted, unlabelled=0, smallest=0.9)


def test_a_region_map_is_coded_without_loss() -> None:
    regions = np.random.default_rng(0).integers(0, 200, (13, 17))
    assert np.array_equal(np.array(Image.open(io.BytesIO(encode_regions(regions)))), regions)


def test_folders_of_images_and_of_parquet_files_are_read_alike(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"image": png(image), "regions": png(regions), "name": name, "source": folder.name}
        for name, (image, regions) in two_images().items()
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "scenes.parquet")
    from_images, from_parquet = (load_scenes(SceneArguments(dataset=str(where))) for where in (folder, tmp_path))
    for scenes in (from_images, from_parquet):
        assert [scene.name for scene in scenes] == ["halves", "thirds"]
        for scene, (image, regions) in zip(scenes, two_images().values(), strict=True):
            assert np.array_equal(scene.image, image)
            assert [int(name.split()[1]) for name in scene.region_names] == sorted(set(regions.flatten().tolist()))
            assert np.array_equal(np.unique(regions)[scene.regions], regions)
    # In this source, 0 means unlabelled.
    (halves, _) = load_scenes(SceneArguments(dataset=str(folder), unlabelled_in=[folder.name]))
    assert halves.region_names == ["region 4"] and not halves.regions.any()
    (small,) = load_scenes(SceneArguments(dataset=str(folder), names=["halves"], image_size=4))
    assert small.image.shape == (3, 4, 3) and small.regions.shape == (3, 4) and len(small.region_names) == 2


def test_folders_without_scenes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images with regions, or none of --names"):
        load_scenes(SceneArguments(dataset=str(tmp_path)))
    with pytest.raises(ValueError, match="has no images with regions, or none of --names"):
        load_scenes(SceneArguments(dataset=str(folder), names=["quarters"]))
    (tmp_path / "odd.png").write_bytes(png(np.zeros((4, 5, 3), dtype=np.uint8)))
    (tmp_path / "odd.regions.png").write_bytes(png(np.zeros((5, 4), dtype=np.uint8)))
    (tmp_path / "alone.regions.png").write_bytes(png(np.zeros((5, 4), dtype=np.uint8)))
    with pytest.raises(ValueError, match="alone.regions.png has no image beside it: alone.jpg, alone.jpeg"):
        load_scenes(SceneArguments(dataset=str(tmp_path)))
    (tmp_path / "alone.regions.png").unlink()
    with pytest.raises(ValueError, match=r"the regions of 'odd' are a picture of \(4, 5\), its image of \(5, 4\)"):
        load_scenes(SceneArguments(dataset=str(tmp_path)))


def test_pixels_are_points_with_colours() -> None:
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    scene = Scene("x", image, np.array([[0, 0, 1, 1], [0, 2, 2, 1]]), ["a", "b", "c"])
    pixels = Pixels(scene, with_classes=True)
    batch = pixels.collate([{**pixels[index], "route_ids": index} for index in (6, 0)])
    # The third pixel of the second row, and the first of the first.
    assert torch.allclose(batch["coordinates"], torch.tensor([[0.25, 0.5], [-0.75, -0.5]]))
    assert torch.allclose(batch["labels"], torch.tensor([[18, 19, 20], [0, 1, 2]]) / 255)
    assert batch["class_ids"].tolist() == [2, 0] and batch["route_ids"].tolist() == [6, 0]
    assert set(Pixels(scene).collate([pixels[0]])) == {"coordinates", "labels"}
    assert [pixels[index]["region"] for index in range(len(pixels))] == [0, 0, 1, 1, 0, 2, 2, 1]
    # Every region has equally many samples; pixels of the smallest repeat.
    balanced = pixels.balanced()
    assert sorted(balanced[index]["pixel"] for index in range(len(balanced))) == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert all(balanced[index] == pixels[balanced[index]["pixel"]] for index in range(9)) and len(pixels) == 8


# The recipe


def test_all_methods_have_the_default_of_steps(folder: Path, tmp_path: Path) -> None:
    scene = load_scenes(SceneArguments(dataset=str(folder), names=["thirds"]))[0]
    prepared = inr.SceneRuns(scene, RTLTrainingArguments(output_dir=str(tmp_path), target_sparsity=[0.5]), 5)
    assert prepared.args.extraction_steps == 100 and prepared.all_regions["extraction_steps"] == 300


def run(folder: Path, output_dir: Path, *arguments: str) -> dict[str, Any]:
    config = Path(inr.__file__).parent / "configs/inr.yaml"
    with pytest.MonkeyPatch.context() as patch:
        command = ["inr.py", "--config", str(config), "--dataset", str(folder), "--output_dir", str(output_dir)]
        patch.setattr(sys, "argv", [*command, "--use_cpu", "--report_to", "none", *arguments])
        patch.setattr(RTLTrainer, "create_model_card", lambda trainer: None)
        inr.main()
    return json.loads((output_dir / "results.json").read_text())


SMALL = (
    *("--target_sparsity", "0.5", "0.75", "--learning_rates", "0.01", "--extraction_steps", "2"),
    *("--retraining_steps", "3", "--route_batch_size", "16"),
)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output_dir = tmp_path_factory.mktemp("inr")
    return output_dir, run(folder, output_dir, *SMALL)


def models(output_dir: Path, report: dict[str, Any]) -> Path:
    method = "IMP single" if report["method"] == "dense" else report["method"]
    name = method.replace(",", "").replace(" ", "-")
    return output_dir / "rate-0.01-seed-0" / report["image"] / name


@pytest.mark.slow
def test_reported_metrics_are_those_of_the_saved_models(results: tuple[Path, dict[str, Any]], folder: Path) -> None:
    output_dir, found = results
    assert len(found["reports"]) == 2 * (2 + 2 + 2 + 2 + 1)
    scenes = {scene.name: scene for scene in load_scenes(SceneArguments(dataset=str(folder)))}
    for report in found["reports"]:
        scene = scenes[report["image"]]
        model = RTLModel.from_pretrained(models(output_dir, report) / report["folder"]).eval()
        height, width = scene.regions.shape
        errors: dict[int, list[float]] = {}
        for y in range(height):
            for x in range(width):
                region = int(scene.regions[y, x])
                point = torch.tensor([[(2 * x + 1) / width - 1, (2 * y + 1) / height - 1]])
                inputs = {"coordinates": point, "route_ids": region if report["method"] == "RTL" else 0}
                if report["method"] != "RTL":
                    inputs["class_ids"] = torch.tensor([region])
                with torch.no_grad():
                    colour = model(**inputs).logits[0].tolist()
                for value, target in zip(colour, scene.image[y, x].tolist(), strict=True):
                    errors.setdefault(region, []).append((min(max(value, 0.0), 1.0) - target / 255) ** 2)
        for region, name in enumerate(scene.region_names):
            expected = -10 * math.log10(sum(errors[region]) / len(errors[region]))
            assert report["psnr_of_regions"][name] == pytest.approx(expected, abs=2e-3)
        squared = [error for of_region in errors.values() for error in of_region]
        assert report["psnr"] == pytest.approx(-10 * math.log10(sum(squared) / len(squared)), abs=2e-3)
        assert report["pixels_of_regions"] == [len(errors[region]) // 3 for region in sorted(errors)]
        # The bytes are counted here again.
        assert report["union"] == sum(
            int(
                np.logical_or.reduce(
                    [model.mask_bank[route][layer].numpy() for route in range(model.num_routes)]
                ).sum()
            )
            for layer in range(len(model.mask_bank.shapes))
        )
        assert report["weight_bytes"] == model.footprint()["compact_bytes"]
        assert report["side_bytes"] == len(png_optimised(scene.regions))


def png_optimised(regions: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(regions.astype(np.uint8)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@pytest.mark.slow
def test_methods_differ_in_their_masks_and_spend_equally_much(results: tuple[Path, dict[str, Any]]) -> None:
    output_dir, found = results
    for image, num_regions in (("halves", 2), ("thirds", 3)):
        of_image = {(r["method"], r["at"]): r for r in found["reports"] if r["image"] == image}
        assert {report["steps"] for report in of_image.values()} == {3 * num_regions}
        weights = {}
        for method in ("RTL", "IMP single", "IMP single, balanced", "IMP single, union"):
            path = models(output_dir, of_image[method, 0.5])
            weights[method] = load_file(path / "theta0.safetensors")
            arguments = json.loads((path / "final/training_args.json").read_text())
            assert arguments["extraction_steps"] == (2 if method == "RTL" else 2 * num_regions)
        for name, tensor in weights["RTL"].items():
            assert torch.equal(tensor, weights["IMP single"][name])
        # The samples trained on are the same only if regions have one size, as these are balanced already.
        samples = [
            json.loads((models(output_dir, of_image[method, 0.5]) / "run.json").read_text())["configuration"][
                "route_ids"
            ]
            for method in ("IMP single", "IMP single, balanced")
        ]
        assert (samples[0] == samples[1]) == (image == "thirds")
        for at in (0.5, 0.75):
            assert of_image["IMP single", at]["union"] == 55_936 - round(at * 55_936)
            assert of_image["IMP single, balanced", at]["union"] == 55_936 - round(at * 55_936)
            assert of_image["IMP single, union", at]["union"] == of_image["RTL", at]["union"] > (1 - at) * 53_888
            model = RTLModel.from_pretrained(models(output_dir, of_image["RTL", at]) / of_image["RTL", at]["folder"])
            flat = [np.concatenate([part.numpy().ravel() for part in model.mask_bank[k]]) for k in range(num_regions)]
            assert {int(mask.sum()) for mask in flat} == {53_888 - round(at * 53_888)}
            for k, similarity in enumerate(of_image["RTL", at]["similarity_of_regions"]):
                pairs = [(flat[k] & other).sum() / (flat[k] | other).sum() for j, other in enumerate(flat) if j != k]
                assert similarity == pytest.approx(np.mean(pairs), abs=1e-5)
        assert of_image["dense", None]["union"] == 55_936


@pytest.mark.slow
def test_tables_are_of_the_reports(results: tuple[Path, dict[str, Any]]) -> None:
    output_dir, found = results

    def of(method: str, at: float | None) -> list[float]:
        return [r["psnr"] for r in found["reports"] if (r["method"], r["at"]) == (method, at)]

    lines = {(line["method"], line["sparsity"]): line for line in found["figures"]}
    pruned = ["RTL", "IMP single", "IMP single, balanced", "IMP single, union"]
    assert [line["method"] for line in found["figures"]] == ["dense", *pruned * 2]
    rtl, single = of("RTL", 0.5), of("IMP single", 0.5)
    assert lines["RTL", 0.5]["PSNR (dB)"] == f"{np.mean(rtl):.2f} ± {np.std(rtl, ddof=1):.2f}"
    reports = [r for r in found["reports"] if (r["method"], r["at"]) == ("RTL", 0.5)]
    of_regions = np.array([np.mean(list(r["psnr_of_regions"].values())) for r in reports])
    assert lines["RTL", 0.5]["mean of regions (dB)"] == f"{of_regions.mean():.2f} ± {of_regions.std(ddof=1):.2f}"
    together = round(sum(r["weight_bytes"] + r["side_bytes"] for r in reports) / 2)
    assert abs(lines["RTL", 0.5]["together"] - together) <= 1
    gains = np.array(rtl) - np.array(single)
    (line,) = [d for d in found["differences"] if (d["sparsity"], d["RTL minus"]) == (0.5, "IMP single")]
    assert line["dB"] == f"{gains.mean():.2f} ± {gains.std(ddof=1):.2f}"
    assert line["images where RTL is better"] == f"{(gains > 0).sum()} of 2"
    others = [r for r in found["reports"] if (r["method"], r["at"]) == ("IMP single", 0.5)]
    gains = of_regions - [np.mean(list(r["psnr_of_regions"].values())) for r in others]
    assert line["dB, mean of regions"] == f"{gains.mean():.2f} ± {gains.std(ddof=1):.2f}"
    assert line["better images so"] == f"{(gains > 0).sum()} of 2"
    (line,) = [d for d in found["differences"] if (d["sparsity"], d["RTL minus"]) == (0.75, "dense")]
    assert line["dB"].split()[0] == f"{np.mean(np.array(of('RTL', 0.75)) - np.array(of('dense', None))):.2f}"
    psnrs = [value for r in reports for value in r["psnr_of_regions"].values()]
    similarities = [value for r in reports for value in r["similarity_of_regions"]]
    (line,) = [c for c in found["correlations"] if c["sparsity"] == 0.5]
    assert line["regions"] == 5 and line["PSNR with similarity"] == pytest.approx(spearman(psnrs, similarities))
    assert found["images"][1] == {
        **{"image": "thirds", "size": "5×9", "regions": 3, "dense": f"{of('dense', None)[1]:.2f}"},
        **{f"{m} {at:.0%}": f"{of(m, at)[1]:.2f}" for m in ("RTL", "IMP single") for at in (0.5, 0.75)},
    }
    for file in found["pictures"]:
        assert Image.open(output_dir / file).size[0] > 300


def spearman(one: list[float], other: list[float]) -> float:
    """Spearman's correlation; equal values have the mean of their ranks."""
    ranks = [
        [sum(x < y for x in values) + (sum(x == y for x in values) - 1) / 2 for y in values] for values in (one, other)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.slow
def test_a_finished_run_is_read_back(
    results: tuple[Path, dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir, found = results
    monkeypatch.setattr(inr, "draw", lambda *arguments: [])
    files = {file: file.stat().st_mtime_ns for file in output_dir.glob("rate-*/*/*/round-*/model.safetensors")}
    again = run(folder, output_dir, *SMALL)
    assert {file: file.stat().st_mtime_ns for file in files} == files and len(files) == 2 * (2 + 3 + 2 + 2)
    assert again["reports"] == found["reports"] and again["figures"] == found["figures"]


def test_an_unknown_method_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--methods has 'IMP double'; allowed are 'RTL', 'IMP single'"):
        run(folder, tmp_path, "--methods", "IMP double")
