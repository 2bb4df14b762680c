"""The recipe on speech, in this process: sines for speech, noise of three colours, and a tiny network."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
import speech
import torch
import yaml
from pyarrow import parquet

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from shared import speech_report
from shared.speech_data import (
    Mixtures,
    SpeechArguments,
    draw_segment,
    load_mixtures,
    mix,
    read_audio,
    read_speech,
    scene_files,
    split_by_time,
)


RATE = 2000
SCENES = ("hall", "wood")


def tone(frequency: float, seconds: float, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten tones of different frequencies, and two recordings of noise for each of two scenes."""
    root = tmp_path_factory.mktemp("audio")
    generator = np.random.default_rng(0)
    for index in range(10):
        (root / "speech").mkdir(exist_ok=True)
        soundfile.write(root / "speech" / f"clip-{index}.wav", tone(100 + 50 * index, 0.6), RATE, subtype="FLOAT")
    for scene in SCENES:
        (root / "noise" / scene).mkdir(parents=True)
        for index in range(2):
            noise = generator.normal(size=4 * RATE) * (0.1 if scene == "hall" else 0.3)
            soundfile.write(root / "noise" / scene / f"{index}.flac", noise.clip(-1, 1), RATE)
    return root / "speech", root / "noise"


def arguments_for(folders: tuple[Path, Path], **changed: object) -> SpeechArguments:
    given = {"segment_seconds": 0.5, "sampling_rate": RATE, "num_train": 8, "num_test": 4}
    return SpeechArguments(speech=str(folders[0]), noise=str(folders[1]), **{**given, **changed})


def decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    signal, noise = (array.astype(np.float64) for array in (signal, noise))
    return float(10 * np.log10(sum(x * x for x in signal) / sum(x * x for x in noise)))


# Data


@pytest.mark.parametrize("snr", [-5, 0, 7.5])
def test_mixtures_have_the_ratio_asked_for(snr):
    generator = np.random.default_rng(0)
    voice, noise = 0.1 * generator.normal(size=500), 3 * generator.normal(size=500)
    mixture = mix(voice.astype(np.float32), noise.astype(np.float32), snr)
    assert mixture.dtype == np.float32
    assert decibels(voice, mixture - voice) == pytest.approx(snr, abs=1e-4)
    # Only scaled noise is added.
    assert np.corrcoef(mixture - voice, noise)[0, 1] == pytest.approx(1, abs=1e-6)


def test_all_mixtures_have_the_ratios_in_turn(folders):
    for mixtures in load_mixtures(arguments_for(folders, snrs=[0.0, 6.0]), seed=0):
        noisy, clean = mixtures.noisy.numpy(), mixtures.clean.numpy()
        ratios = [decibels(c, n - c) for n, c in zip(noisy, clean, strict=True)]
        assert ratios == pytest.approx([0.0, 6.0] * (len(mixtures) // 2), abs=1e-3)
        assert np.bincount(mixtures.scenes.numpy()).tolist() == [len(mixtures) // 2] * 2
        assert mixtures.scene_names == list(SCENES)


def test_no_clip_and_no_noise_is_in_both_parts(tmp_path, folders):
    """The value of a noise sample tells its recording and its time."""
    for index, scene in enumerate(SCENES):
        (tmp_path / scene).mkdir()
        ramp = np.linspace(0.1 + 0.3 * index, 0.3 + 0.3 * index, 4 * RATE)
        soundfile.write(tmp_path / scene / "0.wav", ramp, RATE, subtype="FLOAT")
    arguments = arguments_for((folders[0], tmp_path), num_train=40, num_test=20)
    train, test = load_mixtures(arguments, seed=3)
    pitches, places = [], []
    for mixtures in (train, test):
        spectra = torch.fft.rfft(mixtures.clean).abs()
        # A bin has 2 Hz, since half a second is transformed.
        pitches.append({round(float(bin_) * 2 / 50) * 50 for bin_ in spectra.argmax(dim=1)})
        noise = (mixtures.noisy - mixtures.clean).double()
        # The ramp's value over its slope tells the time at any gain.
        slope = (noise[:, -1] - noise[:, 0]) / (noise.shape[1] - 1)
        starts = noise[:, 0] / slope - torch.tensor([0.1, 0.4])[mixtures.scenes] / (0.2 / (4 * RATE - 1))
        places.append(starts)
    assert pitches == [set(range(100, 500, 50)), {500, 550}]
    border = 0.7 * 4 * RATE
    assert (places[0] > -5).all() and (places[0] + 0.5 * RATE < border + 5).all() and places[0].max() > border / 2
    assert (places[1] > border - 5).all() and (places[1] + 0.5 * RATE < 4 * RATE + 5).all()


def test_seeds_change_training_data_alone(folders):
    arguments = arguments_for(folders)
    first, again, other = (load_mixtures(arguments, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].noisy, again[0].noisy) and not torch.equal(first[0].noisy, other[0].noisy)
    assert torch.equal(first[1].noisy, other[1].noisy)
    # Test mixtures of all scenes have the same speech, but different noise.
    test, half = first[1], len(first[1]) // 2
    assert torch.equal(test.clean[:half], test.clean[half:]) and not torch.equal(test.noisy[:half], test.noisy[half:])


def test_recordings_are_split_by_time():
    audio = np.arange(100, dtype=np.float32)
    first, second = split_by_time(audio, 0.7, 30, Path("rain.ogg"))
    assert first.tolist() == list(range(70)) and second.tolist() == list(range(70, 100))
    with pytest.raises(ValueError, match=r"'rain.ogg' has 100 samples, of which 70% are for training.*31 samples"):
        split_by_time(audio, 0.7, 31, Path("rain.ogg"))


def test_segments_avoid_pauses_and_short_audio_is_padded():
    audio = np.concatenate([np.zeros(1000), np.ones(50), np.zeros(1000)]).astype(np.float32)
    generator = np.random.default_rng(0)
    segments = [draw_segment(audio, 40, generator) for _ in range(30)]
    assert all(len(segment) == 40 and segment.any() for segment in segments)
    assert len({segment.sum() for segment in segments}) > 1
    assert draw_segment(np.ones(3, np.float32), 5, generator).tolist() == [1, 1, 1, 0, 0]


def test_audio_is_resampled_to_one_channel(tmp_path):
    wave = np.stack([tone(200, 1, 5000), np.zeros(5000, np.float32)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", wave, 5000, subtype="FLOAT")
    audio = read_audio(tmp_path / "stereo.wav", RATE)
    assert audio.shape == (RATE,) and audio.dtype == np.float32
    assert np.abs(audio - tone(200, 1) / 2)[100:-100].max() < 1e-3


def test_parquet_files_are_split_already(tmp_path):
    for part, frequencies in (("train", [100, 200]), ("test", [300])):
        rows = []
        for frequency in frequencies:
            buffer = io.BytesIO()
            soundfile.write(buffer, tone(frequency, 0.5), RATE, format="FLAC")
            rows.append({"bytes": buffer.getvalue(), "path": f"{frequency}.flac"})
        parquet.write_table(pyarrow.table({"audio": rows}), tmp_path / f"{part}.parquet")
    train, test = read_speech(SpeechArguments(speech=str(tmp_path), sampling_rate=RATE))
    assert [len(clip) for clip in (*train, *test)] == [1000] * 3
    assert np.abs(train[1] - tone(200, 0.5)).max() < 1e-3 and np.abs(test[0] - tone(300, 0.5)).max() < 1e-3


def test_scenes_are_subfolders_or_named(folders, tmp_path):
    named = {"loud": ["wood/0.flac", "hall/1.flac"], "quiet": ["hall/0.flac"]}
    expected = {scene: [folders[1] / name for name in names] for scene, names in named.items()}
    for given in (named, json.dumps(named)):
        assert scene_files(arguments_for(folders, noise_scenes=given)) == expected
    for none in (None, "null"):
        found = scene_files(arguments_for(folders, noise_scenes=none))
        assert found == {scene: [folders[1] / scene / f"{index}.flac" for index in range(2)] for scene in SCENES}
    with pytest.raises(ValueError, match="has no subfolders; name its scenes by --noise_scenes"):
        scene_files(arguments_for((folders[0], folders[0])))
    with pytest.raises(ValueError, match="--speech: there is no audio"):
        read_speech(arguments_for((tmp_path, folders[1])))


# Metrics


def naive_si_snr(estimate: np.ndarray, target: np.ndarray) -> float:
    """The projection of one on the other, in float64."""
    e, t = (array.astype(np.float64) - array.astype(np.float64).mean() for array in (estimate, target))
    part = sum(x * y for x, y in zip(e, t, strict=True)) / sum(y * y for y in t)
    return decibels(part * t, e - part * t)


def known_mixtures() -> tuple[Mixtures, torch.Tensor]:
    """Mixtures of a cosine and an orthogonal sine of half its amplitude (6.02 dB below), and the sine, the noise."""
    time = torch.arange(200) / 200
    clean = torch.cos(2 * torch.pi * 5 * time).expand(4, -1)
    noise = 0.5 * torch.sin(2 * torch.pi * 5 * time).expand(4, -1)
    return Mixtures(clean + noise, clean, torch.tensor([0, 1, 1, 0]), SCENES), noise


def test_improvement_of_known_answers():
    test, noise = known_mixtures()
    six = 20 * np.log10(2)
    assert speech_report.input_ratios(test) == {name: pytest.approx(six, abs=1e-3) for name in SCENES}
    # In the first scene a tenth of the noise is left: 20 dB. In the second it stays equal, or becomes twice as loud.
    factors = torch.tensor([0.1, 1.0, 2.0, 0.1])
    metrics = speech_report.enhancement_metrics(test.clean + factors[:, None] * noise, test)
    assert metrics["hall/si_snr_improvement"] == pytest.approx(20, abs=1e-2)
    assert metrics["wood/si_snr_improvement"] == pytest.approx(-six / 2, abs=1e-2)
    assert metrics["si_snr_improvement"] == pytest.approx((20 - six / 2) / 2, abs=1e-2)
    scaled = speech_report.enhancement_metrics(-7 * (test.clean + factors[:, None] * noise), test)
    assert scaled == {name: pytest.approx(value, abs=1e-3) for name, value in metrics.items()}


def test_improvement_is_that_of_a_naive_reference():
    generator = np.random.default_rng(0)
    clean, noise, enhanced = generator.normal(size=(3, 5, 80)).astype(np.float32)
    scenes = np.array([0, 1, 0, 0, 1])
    test = Mixtures(*map(torch.from_numpy, (clean + noise, clean, scenes)), SCENES)
    gains = np.array(
        [naive_si_snr(e, c) - naive_si_snr(n, c) for e, c, n in zip(enhanced, clean, clean + noise, strict=True)]
    )
    metrics = speech_report.enhancement_metrics(torch.from_numpy(enhanced), test)
    means = [gains[scenes == scene].mean() for scene in (0, 1)]
    found = [metrics[f"{name}/si_snr_improvement"] for name in SCENES]
    assert found == pytest.approx(means, abs=1e-3)
    assert metrics["si_snr_improvement"] == pytest.approx(sum(means) / 2, abs=1e-3)


def test_differences_are_of_the_same_sparsity():
    lines = [
        {"method": method, "sparsity": sparsity, "SI-SNRi": gain, "union": 5}
        for method, sparsity, gain in (
            ("a", 0.5, 3.0),
            ("a", 0.9, 2.0),
            ("b", 0.5, 1.0),
            ("b", 0.9, 4.0),
            ("c", 0.0, 9.0),
        )
    ]
    assert speech_report.differences(lines, "a", ["b", "c", "d"]) == [
        {"method": "a − b", "sparsity": 0.5, "SI-SNRi": 2.0},
        {"method": "a − b", "sparsity": 0.9, "SI-SNRi": -2.0},
    ]


# The recipe


def tiny(folders: tuple[Path, Path], output_dir: Path) -> list[str]:
    """The command of a run on a tiny network."""
    return [
        *(
            "speech.py",
            "--config",
            str(Path(speech.__file__).parent / "configs/speech.yaml"),
            "--noise_scenes",
            "null",
        ),
        *("--speech", str(folders[0]), "--noise", str(folders[1]), "--output_dir", str(output_dir)),
        *("--segment_seconds", "0.5", "--sampling_rate", str(RATE), "--num_train", "8", "--num_test", "4"),
        *("--channels", "3", "3", "--seeds", "0", "--target_sparsity", "0.3", "0.6", "--shown_sparsity", "0.6"),
        *("--route_batch_size", "4", "--num_train_epochs", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
    ]


@pytest.fixture(scope="module")
def speech_run(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all methods."""
    output_dir = tmp_path_factory.mktemp("runs") / "speech"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", tiny(folders, output_dir))
        patch.setattr(RTLTrainer, "create_model_card", lambda trainer: None)
        speech.main()
        first = (output_dir / "results.json").read_bytes()
        # Repeated, the command reads everything back. The pictures, which take longest, are made again from the same.
        patch.setattr("shared.plots.draw_spectrograms", lambda *arguments: None)
        speech.main()
    again = json.loads((output_dir / "results.json").read_bytes())
    assert {**json.loads(first), "minutes": again["minutes"]} == again
    return output_dir


@pytest.mark.slow
def test_a_method_trains_no_other(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*tiny(folders, tmp_path), "--methods", "dense"])
    monkeypatch.setattr("shared.plots.draw_spectrograms", lambda *arguments: None)
    speech.main()
    assert {file.parent.name for file in (tmp_path / "seed-0").glob("*/*")} == {"dense"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_weights"] == 2 * 3 * 15 + 3 * 3 * 9 + 3 * 3 * 9 + 6 * 2 * 15


@pytest.mark.slow
def test_all_methods_are_compared_at_the_same_cost(speech_run):
    results = json.loads((speech_run / "results.json").read_text())
    assert results["num_weights"] == 2 * 3 * 15 + 3 * 3 * 9 + 3 * 3 * 9 + 6 * 2 * 15
    lines = {(line["method"], line["sparsity"]): line for line in results["costs"]}
    assert lines.keys() == {("dense", 0.0)} | {(m, s) for m in speech.METHODS[1:] for s in (0.3, 0.6)}
    # Two scenes of eight mixtures, one epoch.
    assert {line["samples in retraining"] for line in lines.values()} == {16}
    total = results["num_weights"]
    for sparsity, num_events in ((0.3, 1), (0.6, 2)):
        kept = total - round(sparsity * total)
        assert lines["IMP single", sparsity]["union"] == kept and lines["IMP multiple", sparsity]["union"] == 2 * kept
        union = lines["RTL, per route", sparsity]["union"]
        assert kept < union < 2 * kept
        assert union == lines["IMP single, union", sparsity]["union"] == lines["RTL, shared", sparsity]["union"]
        tickets, single = lines["RTL, per route", sparsity], lines["IMP single", sparsity]
        assert tickets["trainings"] == 2 * num_events + 1 and single["trainings"] == num_events + 1
        assert lines["IMP multiple", sparsity]["trainings"] == 2 * num_events + 2
        assert tickets["samples in extraction"] == single["samples in extraction"] == num_events * 16
    assert len(results["differences"]) == 8


@pytest.mark.slow
def test_metrics_are_those_of_the_saved_models(speech_run, folders):
    results = json.loads((speech_run / "results.json").read_text())
    _, test = load_mixtures(arguments_for(folders), seed=0)
    noisy, clean = test.noisy.numpy(), test.clean.numpy()
    for method, routes in (("RTL, per route", test.scenes), ("RTL, shared", test.scenes), ("IMP single", 0)):
        folder = speech_run / "seed-0" / method.replace(",", "").replace(" ", "-") / "final"
        model = RTLModel.from_pretrained(folder).eval()
        with torch.no_grad():
            enhanced = model(input_values=test.noisy, route_ids=routes).logits.numpy()
        gains = np.array(
            [naive_si_snr(e, c) - naive_si_snr(n, c) for e, c, n in zip(enhanced, clean, noisy, strict=True)]
        )
        (line,) = [line for line in results["figures"] if (line["method"], line["sparsity"]) == (method, 0.6)]
        for scene, name in enumerate(SCENES):
            assert float(line[name]) == pytest.approx(gains[test.scenes.numpy() == scene].mean(), abs=2e-3)
        assert float(line["SI-SNRi"]) == pytest.approx(gains.mean(), abs=2e-3)
        if method == "RTL, per route":
            for scene, name in enumerate(SCENES):
                written, rate = soundfile.read(speech_run / "audio" / f"{name}-RTL-per-route.wav", dtype="float32")
                index = 4 * scene
                assert rate == RATE and np.allclose(written, enhanced[index], atol=1e-6)
                written, _ = soundfile.read(speech_run / "audio" / f"{name}-clean.wav", dtype="float32")
                assert np.array_equal(written, clean[index])
    assert len(list((speech_run / "audio").glob("*.wav"))) == 8
    assert 5_000 < (speech_run / "spectrograms.png").stat().st_size < 200_000


@pytest.mark.slow
def test_independent_networks_share_nothing(speech_run, folders):
    """Each has its own mask and the batches of its scene; the mask of the other does not matter to it."""
    from transformers import HfArgumentParser

    config = yaml.safe_load((Path(speech.__file__).parent / "configs/speech.yaml").read_text())
    names = RTLTrainingArguments.__dataclass_fields__
    given = {name: value for name, value in config.items() if name in names}
    given |= {"output_dir": str(speech_run), "target_sparsity": [0.3, 0.6], "route_batch_size": 4, "use_cpu": True}
    given["num_train_epochs"] = 1
    (args,) = HfArgumentParser(RTLTrainingArguments).parse_dict({**given, "disable_tqdm": True})
    comparison = speech.ComparisonArguments(channels=[3, 3], seeds=[0])
    runs = speech.SpeechRuns(comparison, arguments_for(folders), args, 0)
    trainer: RTLTrainer = runs.trained(speech.PER_ROUTE)
    tickets = [trainer.model.mask_bank[route] for route in range(2)]
    full = [torch.ones_like(mask) for mask in tickets[1]]
    first, second = (
        speech.enhanced_apart(trainer, runs.test, masks, round_index=1) for masks in (tickets, [tickets[0], full])
    )
    hall = runs.test.scenes == 0
    assert torch.equal(first[hall], second[hall]) and not torch.equal(first[~hall], second[~hall])
    kept = json.loads((speech_run / "seed-0" / "IMP-multiple" / "sparsity-0.6.json").read_text())
    assert speech_report.enhancement_metrics(first, runs.test) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "IMP"], "--methods has 'IMP'; allowed are 'dense', 'IMP single'"),
        (["--shown_sparsity", "0.4"], "--shown_sparsity 0.4 is not in --target_sparsity"),
    ],
)
def test_unknown_choices_are_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["speech.py", "--output_dir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message):
        speech.main()


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speech.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        speech.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in printed for name in ("--noise_scenes", "--snrs", "IMP multiple", "subfolder", "SI-SNR"))
