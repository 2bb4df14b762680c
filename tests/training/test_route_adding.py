"""`add_route` adds a ticket for new data, and changes nothing else."""

import copy

import pytest
import torch
from torch.utils.data import Subset
from transformers import ViTConfig

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLTrainer
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.norm_statistics import tracking_layers
from hf_rtl.training.ticket_trainer import TicketTrainer
from tests.training.small_runs import DOMAINS, ROUTES, Broken, Images, arguments, bits, image_model, make_trainer, same


LABELS = {"route_column": "domain", "target_sparsity": [0.6]}


def trained_model(kind, seed=0):
    """A model as after a training: masks that leave weights unused, and different statistics for each route."""
    options = {"route_names": ROUTES, "seed": seed}
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=2, hidden_dropout_prob=0.1)
        model = RTLModelForImageClassification.from_backbone(config, ticket_task="labels", **options)
    else:
        task = "membership" if kind == "membership" else "labels"
        labels = {} if task == "membership" else {"num_labels": 2}
        private = ["*bn1*", "*.fc.*"] if kind == "private" else []
        model = image_model(seed, ticket_task=task, private_parameters=private, **labels)
    generator = torch.Generator().manual_seed(seed)
    for route in range(3):
        model.mask_bank[route] = [torch.rand(s, generator=generator) < 0.3 for s in model.mask_bank.shapes]
    with torch.no_grad():
        for rows in [*model.norm_statistics.rows, *model.private_parameters.rows]:
            rows.copy_((rows + 0.2 * torch.rand(rows.shape, generator=generator)).to(rows.dtype))
    return model.eval()


def new_data(number=24, columns=DOMAINS, seed=9):
    return Images(number, seed, columns, noise=0.1)


def adding_trainer(folder, kind, model=None, **values):
    model = trained_model(kind) if model is None else model
    if kind == "membership":
        return make_trainer(folder, model, **{"target_sparsity": [0.6], **values})
    data = {"train": Images(24, columns=DOMAINS), "evaluate": Images(12, 1, DOMAINS)}
    return make_trainer(folder, model, **{**data, **LABELS, **values})


def read_columns(kind):
    return ("pixel_values", "label") if kind == "membership" else DOMAINS


@torch.no_grad()
def outputs(model, route):
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.eval()(pixel_values=images, route_ids=route).logits


KINDS = ["membership", "labels", "private", "vit"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "learning_rate": 0.05,
        },
        {"bf16": True, "weight_decay": 0.1, "learning_rate": 0.01},
    ],
    ids=["plain", "sgd", "bf16"],
)
def test_other_tickets_stay_as_they_are(tmp_path, kind, options):
    model = trained_model(kind)
    before = {route: outputs(model, route) for route in ROUTES}
    old, union = copy.deepcopy(model), model.mask_bank.union()
    made = adding_trainer(tmp_path / "run", kind, model, **options)
    report = made.add_route("dog", new_data(24, read_columns(kind)))

    assert model.route_names == model.config.route_names == [*ROUTES, "dog"] and model.config.added_routes == ["dog"]
    assert all(torch.equal(bits(outputs(model, route)), bits(before[route])) for route in ROUTES)
    added = [mask & ~kept for mask, kept in zip(model.mask_bank["dog"], union, strict=True)]
    for weight, initial, mask in zip(model.masker.weights, old.masker.weights, added, strict=True):
        assert torch.equal(weight[~mask], initial[~mask])
        assert not mask.any() or (weight != initial)[mask].float().mean() > 0.5
    kept = model.mask_bank.num_weights - round(0.6 * model.mask_bank.num_weights)
    num_added = sum(int(mask.sum()) for mask in added)
    assert report == {"route": "dog", "kept": kept, "added": num_added, "changed_decisions": None}
    assert kept == int(model.mask_bank.count()[3]) and 0 < num_added < kept  # it keeps weights of other tickets too

    # Biases, norms and head are private; all other tensors stay equal.
    own = [name for name, parameter in old.backbone.named_parameters() if parameter.ndim < 2]
    head = {"vit": "classifier.weight"}.get(kind, "timm_model.fc.weight")
    assert set(model.private_parameters.names) == {*own, head}
    for name, rows in zip(model.private_parameters.names, model.private_parameters.rows, strict=True):
        shared = old.backbone.get_parameter(name)
        if name in old.private_parameters.names:
            shared = old.private_parameters.rows[old.private_parameters.names.index(name)]
        assert torch.equal(rows[:3], shared.expand_as(rows[:3]))
    assert not torch.equal(model.private_parameters.rows[-1][3], model.private_parameters.rows[-1][0])
    initial = old.backbone.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert name in model.mask_bank.weight_names or same(tensor, initial[name]), name
    for rows, other in zip(model.norm_statistics.rows, old.norm_statistics.rows, strict=True):
        assert torch.equal(rows[[0, 1, 2, 4]], other) and not torch.equal(rows[3], other[3])
    # A second added route changes nothing either.
    before["dog"] = outputs(model, "dog")
    made.add_route("owl", new_data(24, read_columns(kind), seed=5))
    assert model.config.added_routes == ["dog", "owl"]
    assert all(torch.equal(bits(outputs(model, route)), bits(before[route])) for route in before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_added_tickets_file_fits_copies_of_the_base(tmp_path, kind):
    base = trained_model(kind)
    base.save_pretrained(tmp_path / "base")
    author = RTLModel.from_pretrained(tmp_path / "base")
    adding_trainer(tmp_path / "run", kind, author).add_route("dog", new_data(24, read_columns(kind)))
    author.save_pretrained(tmp_path / "author")
    assert author.config.base == base.config.base
    author.save_tickets(tmp_path / "tickets", ["dog"])
    user = RTLModel.from_pretrained(tmp_path / "base")
    assert user.load_tickets(tmp_path / "tickets") == ["dog"]
    loaded = RTLModel.from_pretrained(tmp_path / "author")
    for route in (0, 1, 2, 3, UNION):
        assert torch.equal(outputs(user, route), outputs(author, route))
        assert torch.equal(outputs(loaded, route), outputs(author, route))
    ticket = author.extract_ticket("dog").eval()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ticket(images).logits, outputs(author, "dog"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_answers_as_the_network_that_was_trained(tmp_path, monkeypatch, kind):
    networks, begin = [], TicketTrainer.begin
    monkeypatch.setattr(
        TicketTrainer, "begin", lambda self, masks: (networks.append(self.network), begin(self, masks))
    )
    made = adding_trainer(tmp_path, kind)
    made.add_route("dog", new_data(24, read_columns(kind)))
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(networks[-1].eval()(pixel_values=images).logits, outputs(made.model, "dog"))


def test_the_added_ticket_has_statistics_of_its_whole_training_data(tmp_path):
    """The first norm has the mean of the outputs of the convolution before it, over all samples of the route."""
    for number_of_batches in (50, 0):
        data = Images(24, 9, DOMAINS)
        made = adding_trainer(tmp_path / str(number_of_batches), "labels", recalibration_batches=number_of_batches)
        made.add_route("dog", data)
        model = made.model
        pixels = torch.stack([sample["pixel_values"] for sample in data.samples])
        weight = model.backbone.timm_model.conv1.weight * model.mask_bank["dog"][0]
        mean = torch.nn.functional.conv2d(pixels, weight, stride=2).mean((0, 2, 3))
        found = model.norm_statistics.rows[0][3]
        assert torch.allclose(found, mean, atol=1e-6) == (number_of_batches > 0)
        assert all(layer.momentum == 0.1 for layer in tracking_layers(model.backbone))


def test_every_training_starts_from_the_current_weights(tmp_path, monkeypatch):
    model, starts = trained_model("private"), []
    begin = TicketTrainer.begin

    def watched(self, masks):
        begin(self, masks)
        starts.append((masks, {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}))

    monkeypatch.setattr(TicketTrainer, "begin", watched)
    old = copy.deepcopy(model)
    adding_trainer(tmp_path, "private", model, prune_amount=0.3).add_route("dog", new_data())
    assert len(starts) == 3 + 1  # three events keep 0.7, 0.49, 0.4; then the ticket is retrained
    expected = dict(old.backbone.state_dict())
    union = old.extract_ticket(UNION).state_dict()
    for masks, state in starts:
        kept = dict(zip(old.mask_bank.weight_names, masks, strict=True))
        for name, tensor in state.items():
            if name in kept:
                assert torch.equal(tensor, torch.where(kept[name], expected[name], 0.0))
            else:
                assert torch.equal(tensor, union[name]), name
    counts = [sum(int(mask.sum()) for mask in masks) for masks, _ in starts]
    assert counts == [2376, 1663, 1164, 950]


@pytest.mark.slow
def test_the_added_ticket_learns_and_is_reproducible(tmp_path):
    found = []
    for number in range(2):
        made = adding_trainer(tmp_path / str(number), "labels", num_train_epochs=30, learning_rate=0.01)
        data = new_data(48)
        for index, sample in enumerate(data.samples):
            sample["labels"] = index % 2
            sample["pixel_values"] = sample["pixel_values"] + (4 * (index % 2) - 2)
        made.add_route("dog", data)
        found.append(made.model)
    images, labels = (torch.stack([torch.as_tensor(s[k]) for s in data.samples]) for k in ("pixel_values", "labels"))
    with torch.no_grad():
        answers = found[0](pixel_values=images, route_ids="dog").logits.argmax(1)
    assert (answers == labels).float().mean() > 0.9
    for one, two in zip(found[0].state_dict().values(), found[1].state_dict().values(), strict=True):
        assert same(one, two)


def test_a_router_is_fitted_again(tmp_path):
    made = adding_trainer(tmp_path, "labels", calibration_fraction=0.25, train=Images(48, columns=DOMAINS))
    made.fit_router("score", threshold=0.1, fallback="bee")
    model, held_out = made.model, made.run_data.calibration_dataset

    def decisions():
        images = torch.stack([held_out[index]["pixel_values"] for index in range(len(held_out))])
        return model.eval().infer_routes(pixel_values=images).route_ids

    before = decisions()
    report = made.add_route("dog", new_data())
    changed = (decisions() != before).double()
    domains = torch.tensor([held_out[index]["domain"] for index in range(len(held_out))])
    assert report["changed_decisions"] == {n: float(changed[domains == k].mean()) for k, n in enumerate(ROUTES)}
    data = made.run_data
    for dataset, counts in ((data.training.dataset, [12, 12, 12, 18]), (data.calibration_dataset, [4, 4, 4, 6])):
        # The route column of the new samples is not read.
        assert made.eval_partition(dataset).counts.tolist() == counts
    assert model.router.num_routes == 4 and len(made.run_data.calibration_dataset) == len(held_out) + 6
    assert (model.config.router, model.config.router_threshold, model.config.router_fallback) == ("score", 0.1, "bee")


def test_a_router_without_data_to_fit_it_is_taken_out(tmp_path, caplog):
    made = adding_trainer(tmp_path / "first", "labels", calibration_fraction=0.25, train=Images(48, columns=DOMAINS))
    made.fit_router("score")
    report = adding_trainer(tmp_path / "second", "labels", made.model).add_route("dog", new_data())
    assert made.model.router is None and report["changed_decisions"] is None
    assert "the router 'score' does not know the new route 'dog' and is removed" in caplog.text


def test_the_threshold_of_the_added_ticket_is_calibrated_and_the_others_stay(tmp_path):
    for number, options in enumerate([{}, {"calibration_fraction": 0.25}]):
        model = trained_model("membership")
        model.config.thresholds = [1.0, -2.0, 3.0]
        made = adding_trainer(tmp_path / str(number), "membership", model, train=Images(48), **options)
        made.add_route("dog", new_data(24, ("pixel_values", "label")))
        assert model.config.thresholds[:3] == [1.0, -2.0, 3.0]
        assert (model.config.thresholds[3] == 0.0) == (not options)
        assert model.config.id2label == dict(enumerate([*ROUTES, "dog"]))


def test_negatives_are_the_samples_of_the_trainer(tmp_path):
    made = adding_trainer(tmp_path, "membership")
    new = new_data(24, ("pixel_values", "label"))
    made.train_dataset.fetched.clear()
    new.fetched.clear()
    made.add_route("dog", new)
    own, others = len(new.fetched), len(made.train_dataset.fetched)
    assert abs(own - others) < 8 and own > 20  # half of every batch


def test_labels_need_no_training_data(tmp_path):
    model = trained_model("labels")
    made = RTLTrainer(model, arguments(tmp_path, **LABELS))
    made.add_route("dog", new_data())
    assert model.route_names == [*ROUTES, "dog"]
    with pytest.raises(ValueError, match="training needs a `train_dataset`"):
        made.train()


def test_what_cannot_be_added_changes_nothing(tmp_path):
    def refused(made, message, *arguments, error=ValueError, **keywords):
        before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        config, data = made.model.config.to_dict(), made.run_data.training
        with pytest.raises(error, match=message):
            made.add_route(*arguments, **keywords)
        assert made.model.config.to_dict() == config and made.run_data.training is data
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())

    labels = adding_trainer(tmp_path / "labels", "labels")
    refused(labels, "'ant' more than once", "ant", new_data())
    refused(labels, "a single sample", "dog", Subset(new_data(), [0]))
    refused(labels, "'dog' has the single label 0", "dog", Subset(new_data(), [0, 1, 2]))
    refused(labels, "the columns .*domain, but.*|both need the same", "dog", new_data(24, ("pixel_values", "labels")))
    refused(labels, "this trainer has none", "dog", new_data(), calibration_dataset=new_data(6))
    held = adding_trainer(tmp_path / "held", "labels", calibration_fraction=0.25, train=Images(48, columns=DOMAINS))
    refused(held, "holds out `calibration_fraction`", "dog", new_data(), calibration_dataset=new_data(6))
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    refused(adding_trainer(tmp_path / "plateau", "labels", **plateau), "follows evaluations", "dog", new_data())
    unlabelled = Broken(24, lambda i, sample: {**sample, "labels": None if i == 5 else i % 2}, columns=DOMAINS)
    refused(labels, "Column 'labels' has the label None at sample 5", "dog", unlabelled)
    fast = adding_trainer(tmp_path / "fast", "labels", learning_rate=1e30)
    refused(fast, "the loss became|NaN or infinite|cut the output", "dog", new_data(), error=FloatingPointError)
    alone = RTLTrainer(trained_model("membership"), arguments(tmp_path / "alone", target_sparsity=[0.6]))
    refused(alone, "needs the trainer's `train_dataset`", "dog", new_data(24, ("pixel_values", "label")))
    shared = image_model(ticket_task="labels", num_labels=2, norm_statistics="shared")
    refused(adding_trainer(tmp_path / "s", "labels", shared), "needs `norm_statistics='per_route'`", "dog", new_data())
    assert not list(tmp_path.glob("*/extraction"))
