"""The coordinate network: its outputs against loops, its initial weights, and its use in a routed model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.backbones import CoordinateMLP, CoordinateMLPConfig


def make(**kwargs) -> CoordinateMLP:
    torch.manual_seed(0)
    return CoordinateMLP(CoordinateMLPConfig(**kwargs)).eval()


def routed(fill_masks) -> RTLModel:
    config = CoordinateMLPConfig(hidden_size=6, num_hidden_layers=2, num_frequencies=2)
    model = RTLModel.from_backbone(config, route_names=["sky", "sea", "sand"], ticket_task="labels", seed=0)
    fill_masks(model)
    return model.eval()


def points(number: int) -> torch.Tensor:
    return torch.rand(number, 2) * 2 - 1


@pytest.mark.parametrize("num_classes", [0, 3])
@torch.no_grad()
def test_outputs_and_loss_are_those_of_a_loop(num_classes):
    model = make(
        hidden_size=5, num_hidden_layers=2, num_frequencies=3, num_classes=num_classes, class_embedding_size=4
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    coordinates, colours, classes = points(4), torch.rand(4, 3), torch.tensor([2, 0, 1, 2])
    output = model(coordinates, classes if num_classes else None, labels=colours)
    state = {name: tensor.double().tolist() for name, tensor in model.state_dict().items()}
    squared = 0.0
    for point in range(4):
        x, y = coordinates[point].double().tolist()
        values = [x, y]
        for wave in (math.sin, math.cos):
            for power in range(3):
                values += [wave(2**power * math.pi * x), wave(2**power * math.pi * y)]
        first = state["layers.0.weight"]
        if num_classes:
            # The class embedding is appended to the input, and its weights to those of the first layer.
            values += state["class_embedding.weight"][classes[point]]
            first = [own + extra for own, extra in zip(first, state["class_projection.weight"], strict=True)]
        for layer in range(3):
            weight = first if layer == 0 else state[f"layers.{layer}.weight"]
            bias = state[f"layers.{layer}.bias"]
            values = [
                sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(weight, bias, strict=True)
            ]
            if layer < 2:
                values = [max(value, 0.0) for value in values]
        assert output.logits[point].tolist() == pytest.approx(values, rel=1e-4, abs=1e-4)
        squared += sum((v - c) ** 2 for v, c in zip(values, colours[point].tolist(), strict=True))
    assert float(output.loss) == pytest.approx(squared / 12, rel=1e-4)
    without = model(coordinates, classes if num_classes else None)
    assert without.loss is None and torch.equal(without.logits, output.logits)


def test_the_default_is_the_papers_network():
    model = RTLModel.from_backbone(CoordinateMLPConfig(), route_names=["a", "b"], ticket_task="labels", seed=0)
    shapes = [(128, 34), (128, 128), (128, 128), (128, 128), (3, 128)]
    assert model.mask_bank.shapes == shapes
    assert model.mask_bank.num_weights == 53_888
    told = RTLModel.from_backbone(
        CoordinateMLPConfig(num_classes=7), route_names=["all"], ticket_task="labels", seed=0
    )
    assert told.mask_bank.num_weights == 53_888 + 16 * 128
    assert not any("bias" in name or "embedding" in name for name in told.mask_bank.weight_names)
    assert told.backbone.class_embedding.weight.shape == (7, 16)


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_initial_weights_are_those_of_the_network_without_classes(seed):
    def weights(**kwargs):
        names = ["all"]
        model = RTLModel.from_backbone(
            CoordinateMLPConfig(**kwargs), route_names=names, ticket_task="labels", seed=seed
        )
        return model.backbone.state_dict()

    plain, told, more = weights(), weights(num_classes=3), weights(num_classes=9)
    assert set(told) - set(plain) == {"class_embedding.weight", "class_projection.weight"}
    for name, tensor in plain.items():
        assert torch.equal(tensor, told[name]) and torch.equal(tensor, more[name])


def test_initial_weights_are_kaiming_uniform_for_relu():
    state = make(num_classes=500).state_dict()
    for name, fan_in in {"layers.0": 34, "layers.2": 128, "layers.4": 128, "class_projection": 34}.items():
        weight, bound = state[f"{name}.weight"], math.sqrt(6 / fan_in)
        assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith("bias"))
    assert state["class_embedding.weight"].std() == pytest.approx(1, abs=0.05)


def test_classes_are_asked_for_and_refused():
    with pytest.raises(ValueError, match="`class_ids` are missing, and the network has `num_classes` = 3"):
        make(num_classes=3)(points(2))
    with pytest.raises(ValueError, match="`class_ids` were given, and the network has `num_classes` = 0"):
        make()(points(2), torch.tensor([0, 0]))


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path, fill_masks):
    model = routed(fill_masks)
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    coordinates, routes = points(9), torch.tensor([0, 1, 2] * 3)
    assert torch.equal(model(coordinates, route_ids=routes).logits, loaded(coordinates, route_ids=routes).logits)
    assert (loaded.config.num_labels, loaded.config.problem_type) == (3, "regression")


def test_an_extracted_ticket_is_a_plain_network_with_equal_outputs(tmp_path, fill_masks):
    model, coordinates = routed(fill_masks), points(9)
    expected = model(coordinates, route_ids="sea").logits
    model.extract_ticket("sea").save_pretrained(tmp_path)
    ticket = AutoModel.from_pretrained(tmp_path).eval()
    assert type(ticket) is CoordinateMLP and type(AutoConfig.from_pretrained(tmp_path)) is CoordinateMLPConfig
    assert torch.equal(ticket(coordinates).logits, expected)
    assert not torch.equal(model(coordinates, route_ids="sky").logits, expected)


@torch.no_grad()
def test_a_mixed_batch_has_the_loss_of_all_its_points(fill_masks):
    model, coordinates, colours = routed(fill_masks), points(7), torch.rand(7, 3)
    routes = torch.tensor([2, 0, 0, 1, 2, 2, 2])
    output = model(coordinates, labels=colours, route_ids=routes)
    alone = [model(coordinates[i : i + 1], route_ids=int(route)).logits for i, route in enumerate(routes)]
    assert torch.allclose(output.logits, torch.cat(alone), atol=1e-6)
    assert float(output.loss) == pytest.approx(float(((torch.cat(alone) - colours) ** 2).mean()), rel=1e-5)


def test_the_trainer_keeps_the_columns_that_the_network_takes(tmp_path, fill_masks):
    """With the default collator, and a column that the network does not take."""
    samples = [
        {"coordinates": points(1)[0], "labels": torch.rand(3), "region": index % 3, "note": "x"} for index in range(24)
    ]
    args = RTLTrainingArguments(
        output_dir=str(tmp_path),
        target_sparsity=[0.5],
        prune_amount=0.5,
        extraction_steps=1,
        max_steps=3,
        route_batch_size=4,
        route_column="region",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    config = CoordinateMLPConfig(hidden_size=8, num_hidden_layers=1)
    model = RTLModel.from_backbone(config, route_names=["0", "1", "2"], ticket_task="labels", seed=0)
    trainer = RTLTrainer(model, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    coordinates = torch.stack([sample["coordinates"] for sample in samples])
    colours = torch.stack([sample["labels"] for sample in samples])
    with torch.no_grad():
        logits = trainer.model(coordinates, route_ids=torch.tensor([sample["region"] for sample in samples])).logits
    assert trainer.rounds[0]["metrics"]["eval_loss"] == pytest.approx(
        float(((logits - colours) ** 2).mean()), rel=1e-4
    )
