"""Prune events by activity and in units, and masks without training: against naive references, and in whole runs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import BertConfig

from hf_rtl import RTLModel, RTLModelForSequenceClassification
from hf_rtl.model_card.card import write_card
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.masking import UNION
from hf_rtl.pruning import prune
from hf_rtl.training.extraction import Extraction, scoring_batches
from hf_rtl.training.progress import describe_tickets
from hf_rtl.training.prune_rule import PruneRule
from hf_rtl.training.result_table import result_table
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state
from tests.modeling.small_backbones import units_found_once
from tests.training.interruptions import interrupt
from tests.training.small_runs import (
    contents,
    files,
    image_model,
    make_labels_trainer,
    make_trainer,
    masks_on_disk,
    run,
    same,
)
from tests.training.test_route_adding import adding_trainer, new_data, outputs, trained_model


BERT = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=8, num_labels=2,
)  # fmt: skip
CHANNELS = {"prune_granularity": "channel", "prune_round_to": 2, "target_sparsity": [0.3, 0.6]}
ACTIVE = {"prune_criterion": "activity"}


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


def texts():
    """Texts of different lengths; a route has tokens of its own."""
    lengths = [2 + i * 5 % 6 for i in range(24)]
    return [
        {"input_ids": [2 + 8 * (i % 2) + (i * 3 + k) % 8 for k in range(n)], "labels": i // 2 % 2, "domain": i % 2}
        for i, n in enumerate(lengths)
    ]


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": torch.stack([pad(row, (0, longest - len(row))) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def text_trainer(folder, **values):
    model = RTLModelForSequenceClassification.from_backbone(
        BERT, route_names=["day", "night"], ticket_task="labels", seed=0
    )
    given = {"route_column": "domain", "learning_rate": 0.01, "prune_batches": 2, "route_batch_size": 4, **values}
    options = {"data_collator": collate}
    return make_trainer(folder, model, train=texts(), evaluate=texts(), options=options, **given)


def one_event(made, route, event, mask, num_kept):
    """The mask after a prune event, and the trained weights and network that it came from."""
    theta0 = {name: tensor.detach().clone() for name, tensor in named_state(made.model.backbone)}
    search = Extraction(made, made.run_directory, None, theta0, [])
    found, _ = search.train_and_prune(route, event, made.model.mask_bank.pack(mask), num_kept, lambda: None)
    ticket = made.ticket_trainer(theta0)
    ticket.train(mask, made.extraction_batches(route, event), seed=(made.args.seed, 0, event, route))
    return made.model.mask_bank.unpack(found), ticket.network.double().eval()


def squares(made, network, route, event):
    """For each layer, the squares of the inputs of single texts without padding, `[positions, channels]`."""
    found = {name: [] for name in made.model.mask_bank.weight_names}
    hooks = [
        network.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, given, name=name: found[name].append(given[0].flatten(0, -2).square())
        )
        for name in found
    ]
    with torch.no_grad():
        for batch in scoring_batches(made, route, event):
            for ids, kept in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                network(input_ids=ids[kept][None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.slow
def test_an_event_keeps_the_neurons_that_do_most_after_its_training(tmp_path):
    made = text_trainer(tmp_path, prune_granularity="neuron", prune_round_to=1, **ACTIVE)
    bank, layers = made.model.mask_bank, PruneRule.of(made.model, made.args).layers
    assert [layer.num_units for layer in layers] == [24, 24] and made.args.prune_scope == "layer"
    gone = {0: [1, 5, 7], 1: [0, 2, 23]}
    before = dict(zip(bank.weight_names, (torch.ones(s, dtype=torch.bool) for s in bank.shapes), strict=True))
    for number, units in gone.items():
        before[f"bert.encoder.layer.{number}.intermediate.dense.weight"][units] = False
        before[f"bert.encoder.layer.{number}.output.dense.weight"][:, units] = False
    found, network = one_event(made, 1, 3, list(before.values()), num_kept=30)
    given = squares(made, network, 1, 3)
    for number, units in gone.items():
        reader = f"bert.encoder.layer.{number}.output.dense.weight"
        weight = network.get_parameter(reader).detach()
        scores = []
        for unit in range(24):
            mean = math.fsum(given[reader][:, unit].tolist()) / len(given[reader])
            scores.append(mean * math.fsum(float(value) ** 2 for value in weight[:, unit]))
        assert all(scores[unit] == 0 for unit in units)
        removed = sorted(range(24), key=lambda unit: -scores[unit])[15:]
        before[f"bert.encoder.layer.{number}.intermediate.dense.weight"][removed] = False
        before[reader][:, removed] = False
    assert all(map(torch.equal, found, before.values()))


def test_an_event_ranks_single_weights_in_their_row_by_activity(tmp_path):
    made = text_trainer(tmp_path, prune_scope="row", **ACTIVE)
    bank = made.model.mask_bank
    ones = [torch.ones(shape, dtype=torch.bool) for shape in bank.shapes]
    found, network = one_event(made, 0, 0, ones, bank.num_weights // 2)
    given = squares(made, network, 0, 0)
    for name, mask in zip(bank.weight_names, found, strict=True):
        norms = [math.sqrt(math.fsum(column.tolist())) for column in given[name].T]
        for row, kept in zip(network.get_parameter(name).tolist(), mask, strict=True):
            scores = [abs(value) * norm for value, norm in zip(row, norms, strict=True)]
            best = sorted(range(len(row)), key=lambda index: -scores[index])[: len(row) // 2]
            assert kept.nonzero().flatten().tolist() == sorted(best)


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    """A finished membership run whose tickets lack whole channels."""
    return run(tmp_path_factory.mktemp("channels") / "run", **CHANNELS, **ACTIVE, debug_determinism=True)


@pytest.mark.slow
def test_whole_channels_go_and_reports_tell_what_was_asked_and_what_came(channels, tmp_path):
    made, bank = channels, channels.model.mask_bank
    rounds, layers = made.plan().rounds, PruneRule.of(made.model, made.args).layers
    assert [layer.num_units for layer in layers] == [8, 12]
    # 30 % of 20 are removed, then 60 %; layers keep the nearest multiple of 2.
    assert [round_.kept for round_ in rounds] == [[14], [10, 8]]
    # 8 * .7 = 5.6 and 12 * .7 = 8.4; 8 * .4 = 3.2 and 12 * .4 = 4.8.
    for report, asked, kept in zip(made.rounds, (14, 8), ((6, 8), (4, 4)), strict=True):
        assert report["units"] == {
            "kind": "channel", "number": 20, "asked": asked, "kept": dict.fromkeys(made.model.route_names, sum(kept)),
        }  # fmt: skip
        left = 27 * kept[0] + 9 * kept[0] * kept[1] + 9 * 12 * kept[1]
        assert report["kept"] == dict.fromkeys(made.model.route_names, left)
        assert report["sparsity"] == pytest.approx(1 - left / bank.num_weights)
        saved = json.loads((made.run_directory.path / report["folder"] / "round.json").read_text())
        assert saved["units"] == report["units"] and saved["sparsity"] == report["sparsity"]
    assert bank.count().tolist() == list(made.rounds[-1]["kept"].values())
    assert made.rounds[-1]["mean_similarity"] < 1
    on_disk = masks_on_disk(made.args.output_dir, made.model)
    for (event, route), masks in on_disk.items():
        before = on_disk.get((event - 1, route), masks)
        assert not any((new & ~old).any() for new, old in zip(masks, before, strict=True))
    line = describe_tickets(rounds[1], 8, bank)
    assert line.startswith(f"every ticket keeps 8 of 20 channels (asked: 8), {bank.count()[0]:,} of 2,376 weights")
    title = result_table(made.rounds, made.model.route_names).splitlines()[0]
    assert "30% of channels (" in title and f"60% of channels ({100 * made.rounds[1]['sparsity']:.4g}% of w" in title
    card = write_card(made.model, tmp_path).read_text()
    assert "by the activity of its channels after training on its\nroute alone" in card
    assert "| units per ticket |" in card and "| 14 of 20 channels (asked: 14) |" in card
    assert "| `prune_scope` |" not in card and "| `prune_granularity` |" in card


@pytest.mark.slow
def test_tickets_of_channels_are_small_saved_and_loaded(channels, tmp_path):
    model = channels.model
    loaded = RTLModel.from_pretrained(channels.run_directory.final_folder).eval()
    assert loaded.mask_bank.fingerprint() == model.mask_bank.fingerprint()
    for route in model.route_names:
        small = model.extract_ticket(route, small=True)
        assert small.timm_model.conv1.weight.shape[0] == 4 and small.timm_model.conv2.weight.shape[:2] == (4, 4)
        images = torch.randn(4, 3, 16, 16)
        with torch.no_grad():
            expected = loaded(pixel_values=images, route_ids=route).logits
            assert torch.allclose(small.eval()(pixel_values=images).logits, expected, atol=1e-5)
    model.save_tickets(tmp_path, ["bee"])
    loaded.drop_route("bee")
    loaded.load_tickets(tmp_path)
    assert all(map(torch.equal, loaded.mask_bank["bee"], model.mask_bank["bee"]))
    assert model.footprint()["compact_bytes"] < model.footprint()["full_bytes"]


@pytest.mark.slow
def test_an_interrupted_run_in_channels_is_continued_to_the_same_end(channels, tmp_path, monkeypatch):
    options = {**CHANNELS, **ACTIVE}
    interrupt(monkeypatch, tmp_path / "run", ("prune", 5), **options)
    assert len(contents(tmp_path / "run")) < len(contents(channels.args.output_dir))
    run(tmp_path / "run", **options)
    assert contents(tmp_path / "run") == contents(channels.args.output_dir)
    for change in ({"prune_criterion": "magnitude"}, {"prune_round_to": 1}, {"prune_batches": 3}):
        with pytest.raises(ValueError, match=next(iter(change))):
            run(tmp_path / "run", **{**options, **change})


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, ACTIVE, {**CHANNELS, **ACTIVE}, CHANNELS], ids=str)
def test_without_training_masks_are_chosen_from_the_initial_weights(tmp_path, monkeypatch, values):
    monkeypatch.setattr(TicketTrainer, "step", None)
    options = {"extraction_steps": 0, "extraction_epochs": 9.0, **values, "target_sparsity": [0.5], "max_steps": 2}
    made = make_trainer(tmp_path / "run", disable_tqdm=False, **options)
    initial = [weight.detach().clone() for weight in made.model.masker.weights]
    plan = made.plan()
    assert plan.extraction_steps == [0] * 3 and plan.num_steps == 2
    made.train()
    bank = made.model.mask_bank
    fingerprints = {tuple(torch.cat([mask.flatten() for mask in bank[k]]).tolist()) for k in range(3)}
    assert (len(fingerprints) == 1) == ("prune_criterion" not in values)
    if not values:
        mask = [torch.ones(shape, dtype=torch.bool) for shape in bank.shapes]
        for num_kept in plan.rounds[0].kept:
            mask = prune(initial, mask, num_kept=num_kept)
        assert all(map(torch.equal, mask, bank[0]))


def test_without_training_rewound_weights_are_ranked(tmp_path):
    made = make_labels_trainer(tmp_path / "run", extraction_steps=0, rewind_to=2, max_steps=1, prune_amount=0.9)
    made.train()
    bank, theta0 = made.model.mask_bank, load_file(made.run_directory.theta0_file)
    weights = [theta0[name] for name in bank.weight_names]
    assert not all(map(same, weights, image_model(ticket_task="labels", num_labels=2).masker.weights))
    ones = [torch.ones(shape, dtype=torch.bool) for shape in bank.shapes]
    found = prune(weights, ones, num_kept=bank.num_weights - round(0.3 * bank.num_weights))
    assert all(map(torch.equal, found, bank[0]))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 0])
def test_a_new_route_lacks_whole_neurons(tmp_path, steps):
    model = trained_model("vit")
    before = {route: outputs(model, route) for route in model.route_names}
    options = {"prune_granularity": "neuron", "target_sparsity": [0.5], "extraction_steps": steps, **ACTIVE}
    made = adding_trainer(tmp_path / "run", "vit", model, **options)
    report = made.add_route("dog", new_data())
    assert all(torch.equal(outputs(model, route), before[route]) for route in before)
    # 24 units, of which the larger of two multiples of 8 as near stay.
    assert report["kept"] == model.mask_bank.num_weights - 2 * 2 * 8 * 16
    small = model.extract_ticket("dog", small=True)
    assert small.config.intermediate_size == 16
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(small(pixel_values=images).logits, outputs(model, "dog"), atol=1e-5)
    assert model.eval()(pixel_values=images, route_ids=UNION).logits.isfinite().all()


@pytest.mark.slow
def test_a_granularity_that_the_backbone_lacks_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="BertForS.* has no channel that can be pruned; .*`prune_granularity`"):
        text_trainer(tmp_path / "run", prune_granularity="channel")
    model = image_model(prune_exclude=["*.conv2.*", "*.conv3.*"])
    with pytest.raises(ValueError, match="has no channel that can be pruned: no mask covers what reads"):
        make_trainer(tmp_path / "run", model, **CHANNELS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["nan", "attention"])
def test_activity_that_cannot_be_measured_is_named_before_anything_is_written(tmp_path, tiny_attention_config, kind):
    if kind == "attention":
        model = RTLModelForSequenceClassification.from_backbone(
            tiny_attention_config, route_names=["day", "night"], ticket_task="labels", seed=0
        )
        data = [{"input_ids": [i % 7, 2, 3], "labels": i % 3, "domain": i // 3 % 2} for i in range(12)]
        made = make_trainer(tmp_path, model, train=data, evaluate=data, route_column="domain", **ACTIVE)
        words = "(?s)`prune_criterion` = 'activity': layers.0.attention.in_proj_weight is no weight"
    else:
        made = make_trainer(tmp_path, **ACTIVE)
        with torch.no_grad():
            made.model.masker.weights[0][0] = math.nan
        words = "conv2.weight is given is not finite"
    before = {name: tensor.clone() for name, tensor in named_state(made.model.backbone)}
    with pytest.raises((ValueError, FloatingPointError), match=words):
        made.train()
    assert files(tmp_path) == {}
    assert all(same(tensor, before[name]) for name, tensor in named_state(made.model.backbone))


def test_a_layer_whose_units_would_all_go_is_named_with_its_route(tmp_path):
    model = image_model()
    with torch.no_grad():
        for name in ("conv2", "conv3"):
            model.backbone.get_parameter(f"timm_model.{name}.weight").mul_(1e-6)
    made = make_trainer(tmp_path, model, **{**CHANNELS, "prune_scope": "global", "target_sparsity": [0.6]})
    words = r"extraction of route 'ant', prune event \d: .*would remove all units of .*`prune_scope`"
    with pytest.raises(ValueError, match=words):
        made.train()
    assert not (tmp_path / "final").exists()


def test_few_units_are_counted_in_errors(tmp_path):
    made = make_trainer(tmp_path, **{**CHANNELS, "target_sparsity": [0.01]})
    with pytest.raises(ValueError, match="which removes no channel of 20 beyond the 0 removed before it"):
        made.train()
    assert files(tmp_path) == {}
