"""Runs whose tickets predict labels, and runs that rewind to weights after dense steps."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import MarianConfig, PegasusConfig, T5Config

from hf_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
)
from hf_rtl.modeling.files import read_tensors
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state
from tests.training.small_runs import DOMAINS, Images, Recorder, image_model, make_trainer, run, same, timeless


def sentences(number, seed=0):
    """Tokens of two domains; the label is whether the first token is high."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(2, 30, size=(number, 6))
    return datasets.Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "domain": ["news" if index % 3 else "law" for index in range(number)],
            "label": (tokens[:, 0] > 15).astype(int).tolist(),
            "unused": ["x"] * number,
        }
    )


def text_model(**arguments):
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=2,
    )
    return RTLModelForSequenceClassification.from_backbone(
        config, route_names=["law", "news"], ticket_task="labels", seed=0, **arguments
    )


def test_a_labels_run_with_a_route_column(tmp_path):
    values = {"train": sentences(24), "evaluate": sentences(12, seed=1), "route_column": "domain"}
    made = run(tmp_path / "run", text_model(norm_statistics="shared"), **values)
    total = made.model.mask_bank.num_weights
    assert made.model.mask_bank.count().tolist() == [total - round(0.6 * total)] * 2
    assert made.plan().route_sizes == {"law": 8, "news": 16}
    metrics = made.rounds[-1]["metrics"]
    assert {"eval_law/accuracy", "eval_news/accuracy", "eval_accuracy", "eval_worst_route_accuracy"} <= metrics.keys()
    weighted = (4 * metrics["eval_law/accuracy"] + 8 * metrics["eval_news/accuracy"]) / 12
    assert metrics["eval_accuracy"] == pytest.approx(weighted)
    model = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final")
    again = make_trainer(tmp_path / "unused", model, **values).evaluate()
    assert timeless(again) == timeless(metrics)
    # The accuracy is computed as a user would.
    data = sentences(12, seed=1)
    logits = model(input_ids=torch.tensor(data["input_ids"]), route_ids=list(data["domain"])).logits
    assert metrics["eval_accuracy"] == (logits.argmax(1) == torch.tensor(data["label"])).float().mean()
    predicted = made.predict(sentences(12, seed=1))
    assert predicted.metrics["test_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.slow
def test_a_run_of_token_classification(tmp_path, tiny_bert_config):
    """Sentences of different lengths; the class of a token is whether it is high."""

    def tokens(number, seed):
        generator = np.random.default_rng(seed)
        rows = [generator.integers(2, 40, size=5 + index % 3).tolist() for index in range(number)]
        return [
            {"input_ids": row, "labels": [int(token > 20) for token in row], "domain": ("law", "news")[index % 2]}
            for index, row in enumerate(rows)
        ]

    def pad(samples):
        length = max(len(sample["input_ids"]) for sample in samples)
        return {
            name: torch.tensor([sample[name] + [fill] * (length - len(sample[name])) for sample in samples])
            for name, fill in (("input_ids", 0), ("labels", -100))
        } | {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0] if name == "route_ids"}

    model = RTLModelForTokenClassification.from_backbone(
        tiny_bert_config, route_names=["law", "news"], ticket_task="labels", seed=0
    )
    values = {"train": tokens(24, 0), "evaluate": tokens(12, 1), "route_column": "domain"}
    made = run(tmp_path / "run", model, options={"data_collator": pad}, num_train_epochs=10, **values)
    saved = RTLModelForTokenClassification.from_pretrained(tmp_path / "run" / "final")
    assert (
        saved.mask_bank.count().tolist()
        == [saved.mask_bank.num_weights - round(0.6 * saved.mask_bank.num_weights)] * 2
    )
    losses = [report["loss"] for report in made.rounds[-1]["log_history"] if "loss" in report]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[-40:-30])
    # The loss is the mean over all labelled tokens, each sentence through the ticket of its domain.
    batch = pad(values["evaluate"])
    logits = saved(input_ids=batch["input_ids"], route_ids=[sample["domain"] for sample in values["evaluate"]]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    evaluated = make_trainer(
        tmp_path / "unused", saved, options={"data_collator": pad}, per_device_eval_batch_size=12, **values
    ).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_a_run_of_audio_classification(tmp_path):
    """Noise with a louder half; the class says which half."""

    def sounds(number, seed):
        generator = torch.Generator().manual_seed(seed)
        spectra = torch.randn(number, 32, 16, generator=generator)
        for index in range(number):
            spectra[index, :, 8 * (index // 2 % 2) :][:, :8] += 2
        return [
            {"input_values": spectrum, "label": index // 2 % 2, "domain": ("indoor", "street")[index % 2]}
            for index, spectrum in enumerate(spectra)
        ]

    config = transformers.ASTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=2,
    )
    model = RTLModelForAudioClassification.from_backbone(
        config, route_names=["indoor", "street"], ticket_task="labels", seed=0
    )
    values = {"train": sounds(24, 0), "evaluate": sounds(12, 1), "route_column": "domain"}
    made = run(tmp_path / "run", model, learning_rate=1e-2, num_train_epochs=10, **values)
    metrics = made.rounds[-1]["metrics"]
    saved = RTLModel.from_pretrained(tmp_path / "run" / "final")
    assert isinstance(saved, RTLModelForAudioClassification)
    correct = []
    for sample in values["evaluate"]:
        ticket = saved.extract_ticket(sample["domain"])
        correct.append(int(ticket(sample["input_values"][None]).logits.argmax()) == sample["label"])
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(correct)) and np.mean(correct) > 0.8
    assert metrics["eval_street/accuracy"] == pytest.approx(np.mean(correct[1::2]))


def test_shared_statistics_of_a_labels_run(tmp_path):
    columns = DOMAINS
    model = image_model(ticket_task="labels", num_labels=2, norm_statistics="shared")
    values = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
    made = run(tmp_path / "run", model, target_sparsity=[0.3], **values)
    assert made.model.norm_statistics is None
    tensors = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert not [name for name in tensors if name.startswith("norm_statistics")]
    saved = RTLModel.from_pretrained(tmp_path / "run" / "final")
    again = make_trainer(tmp_path / "unused", saved, **values).evaluate()
    assert again["eval_loss"] == made.rounds[0]["metrics"]["eval_loss"]


@pytest.mark.slow
def test_rewinding_to_weights_after_dense_steps(tmp_path):
    columns = DOMAINS

    def make(folder, **values):
        model = image_model(ticket_task="labels", num_labels=2)
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        return make_trainer(folder, model, target_sparsity=[0.3], callbacks=[recorded], **data, **values)

    thetas = []
    for steps in (0, 2, 3):
        recorded = Recorder()
        made = make(tmp_path / str(steps), rewind_to=steps)
        made.train()
        theta0 = read_tensors(tmp_path / str(steps) / "theta0.safetensors")
        backbone, rows = recorded.starts[0]
        assert all(same(backbone[name], theta0[name]) for name in theta0)
        assert same(rows[0][1], theta0["timm_model.bn1.running_mean"])
        assert int(theta0["timm_model.bn1.num_batches_tracked"]) == steps
        thetas.append(hash_tensors(theta0))
        initial = dict(named_state(image_model(ticket_task="labels", num_labels=2).backbone))
        outside = [
            same(made.model.backbone.get_parameter(name)[~union], theta0[name][~union])
            for name, union in zip(made.model.mask_bank.weight_names, made.model.mask_bank.union(), strict=True)
        ]
        assert all(outside)
        assert (steps == 0) == all(same(theta0[name], initial[name]) for name in initial)
    assert len(set(thetas)) == 3
    recorded = Recorder()
    make(tmp_path / "again", rewind_to=3).train()
    assert hash_tensors(read_tensors(tmp_path / "again" / "theta0.safetensors")) == thetas[-1]


def test_rewinding_uses_the_threads_of_extraction(tmp_path, monkeypatch):
    columns = DOMAINS
    model = image_model(ticket_task="labels", num_labels=2)
    threads, used = 5, []
    original = TicketTrainer.step

    def set_num_threads(number):
        nonlocal threads
        threads = number

    def step(self, batch):
        used.append(threads)
        return original(self, batch)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(TicketTrainer, "step", step)
    data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
    run(tmp_path / "run", model, target_sparsity=[0.3], rewind_to=1, extraction_threads=3, **data)
    assert used == [3] * (1 + 3 * 2)
    assert threads == 5


SEQUENCES = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
LAYERS = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 24))},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 12},
}


def sequence_run(folder, config, **options):
    """A run of a model that reverses sequences, with routes of low and high tokens."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(2, 20, size=6) + index % 2 * 20 for index in range(24)]
    data = [
        {"input_ids": torch.tensor(row), "labels": torch.tensor(row[::-1].copy()), "domain": index % 2}
        for index, row in enumerate(rows)
    ]
    model = RTLModelForSeq2SeqLM.from_backbone(config, route_names=["low", "high"], ticket_task="labels", seed=0)
    return run(folder, model, train=data, evaluate=data, route_column="domain", target_sparsity=[0.3], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        T5Config(**SEQUENCES, d_kv=8, d_ff=24, num_layers=1, num_heads=2),
        MarianConfig(**SEQUENCES, **LAYERS),
        pytest.param(PegasusConfig(**SEQUENCES, **LAYERS), marks=pytest.mark.long),
    ],
    ids=lambda config: config.model_type,
)
def test_encoder_decoder_models_train(tmp_path, config):
    made = sequence_run(tmp_path, config, num_train_epochs=6, learning_rate=0.01)
    losses = [report["loss"] for report in made.rounds[-1]["log_history"] if "loss" in report]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert np.isfinite(made.rounds[-1]["metrics"]["eval_loss"])


@pytest.mark.slow
def test_a_decoder_that_reads_no_encoder_is_noticed(tmp_path):
    """Without cross-attention the output depends on the decoder's own input alone."""
    made = sequence_run(tmp_path, T5Config(**SEQUENCES, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    trainer = made.ticket_trainer(dict(named_state(made.model.backbone)))
    batch = next(iter(made.extraction_batches(0, 0)))
    names = made.model.mask_bank.weight_names
    masks = [torch.ones(shape, dtype=torch.bool) for shape in made.model.mask_bank.shapes]
    assert not trainer.is_disconnected(masks, batch)
    cut = [mask & ("EncDecAttention" not in name) for mask, name in zip(masks, names, strict=True)]
    assert trainer.is_disconnected(cut, batch)
