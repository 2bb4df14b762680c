"""Rows of private parameters: in steps, in files, and when routes are added and dropped."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

from hf_rtl import (
    MaskedAdamW,
    MaskedSGD,
    RTLModel,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    mask_updates,
)
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.prunable import parameter_aliases
from tests.training.optimizers import OPTIMIZERS, batch, bits, per_element
from tests.training.small_runs import SMALL_NET


ROUTES = ["ant", "bee", "cat"]
PRIVATE = ["*layernorm*", "*.bias", "classifier.*"]
ODD = torch.tensor([-0.0, float("inf"), float("nan"), -1e-42])


def small_model(fill_masks, *, private=PRIVATE, spread=True, seed=0, **config):
    """A tiny ViT with random masks, whose private rows differ."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    image = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 2}
    model = RTLModelForImageClassification.from_backbone(
        ViTConfig(**{**sizes, **image, "hidden_dropout_prob": 0.0, **config}),
        route_names=ROUTES,
        ticket_task="labels",
        seed=seed,
        private_parameters=private,
    )
    fill_masks(model)
    if spread:
        spread_rows(model)
    return model.train()


@torch.no_grad()
def spread_rows(model):
    for rows in model.private_parameters.rows:
        rows.add_(0.1 * torch.randn_like(rows))
    if model.norm_statistics is not None:
        for rows in model.norm_statistics.rows:
            rows.copy_((rows + torch.rand(rows.shape)).to(rows.dtype))


def backward(model, route, seed, scale=lambda loss: loss):
    with model.route_context(route):
        scale(model(**batch(seed)).loss).backward()


def snapshot(model, optimizer):
    """The bits of every private parameter and of its optimizer state; missing state counts as zero."""
    return [
        {name: bits(value).clone() for name, value in {"rows": rows, **per_element(optimizer, rows)}.items()}
        for rows in model.private_parameters.rows
    ]


def assert_only_moved(model, optimizer, before, routes):
    others = [route for route in range(3) if route not in routes]
    for rows, old in zip(model.private_parameters.rows, before, strict=True):
        for name, value in {"rows": rows, **per_element(optimizer, rows)}.items():
            assert torch.equal(bits(value)[others], old.get(name, torch.zeros_like(bits(value)))[others]), name
    # The bias of attention's keys has no effect, and clipped updates are small.
    moved = [
        (bits(rows) != old["rows"])[routes].any()
        for rows, old in zip(model.private_parameters.rows, before, strict=True)
    ]
    assert sum(moved) > 0.8 * len(moved)


# Steps


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_step_moves_the_row_of_its_route_and_no_other(fill_masks, name, clip):
    model = small_model(fill_masks)
    with torch.no_grad():  # values of an untrained route that any arithmetic would change
        for rows in model.private_parameters.rows:
            rows[2] = ODD.repeat(rows[2].numel())[: rows[2].numel()].view_as(rows[2])
    optimizer = OPTIMIZERS[name](model)
    for step in range(8):
        route = step % 2
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        for part in range(1 + step // 6):  # The last steps accumulate two batches.
            backward(model, route, seed=10 * step + part)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert_only_moved(model, optimizer, before, [route])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_several_routes_moves_their_rows(fill_masks, name):
    model = small_model(fill_masks)
    optimizer = OPTIMIZERS[name](model)
    for routes in ([0, 1], [1, 2], [0, 2], [UNION]):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        for route in routes:
            backward(model, route, seed=route + 1)
        optimizer.step()
        assert_only_moved(model, optimizer, before, [0, 1, 2] if routes == [UNION] else routes)


@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay", "AdamW-fused", "RMSprop"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(fill_masks, name, precision):
    """In fp16, a step that the scaler skips changes nothing and is forgotten."""
    model = small_model(fill_masks)
    optimizer = OPTIMIZERS[name](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision == "fp16")
    for step in range(6):
        overflows = precision == "fp16" and step in (0, 2)
        before = snapshot(model, optimizer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backward(model, step % 3, seed=step, scale=scaler.scale)
        if overflows:
            model.private_parameters.rows[0].grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflows:
            for rows, old in zip(model.private_parameters.rows, before, strict=True):
                assert torch.equal(bits(rows), old["rows"])
        else:
            assert_only_moved(model, optimizer, before, [step % 3])


SETTINGS = {
    "MaskedSGD": (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
    "MaskedSGD-all": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "MaskedAdamW": (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (None, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_row_is_trained_as_torch_trains_the_extracted_ticket(fill_masks, setting):
    """If everything shared is frozen, joint training is one training per route, bias corrections included."""
    masked, plain, arguments = SETTINGS[setting]
    model = small_model(fill_masks).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("private_parameters."))
    tickets = [model.extract_ticket(route).train() for route in range(3)]
    for ticket in tickets:
        trained = {name for name, parameter in ticket.named_parameters() if parameter.requires_grad}
        assert trained == set(model.private_parameters.names)
    optimizers = [plain([p for p in ticket.parameters() if p.requires_grad], **arguments) for ticket in tickets]
    if masked is None:
        optimizer = mask_updates(plain(model.parameters(), **arguments), model)
    else:
        optimizer = masked(model.parameters(), model, **arguments)
    for step in range(12):
        route = (0, 1, 1, 2, 0, 1)[step % 6]
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(step).items()}
        with model.route_context(route):
            model(**inputs).loss.backward()
        tickets[route](**inputs).loss.backward()
        for one in (optimizer, optimizers[route]):
            one.step()
            one.zero_grad()
    for name, rows in zip(model.private_parameters.names, model.private_parameters.rows, strict=True):
        for route, ticket in enumerate(tickets):
            torch.testing.assert_close(rows[route], ticket.get_parameter(name), rtol=1e-9, atol=1e-10)


def test_frozen_parameters_stay_frozen(fill_masks):
    backbone = small_model(fill_masks, private=()).backbone
    backbone.classifier.bias.requires_grad_(False)
    options = {"route_names": ROUTES, "ticket_task": "labels", "private_parameters": PRIVATE}
    model = RTLModelForImageClassification.from_backbone(backbone, **options)
    rows = dict(zip(model.private_parameters.names, model.private_parameters.rows, strict=True))
    assert [name for name, parameter in rows.items() if not parameter.requires_grad] == ["classifier.bias"]


# Files


def models(kind, fill_masks):
    options = {"route_names": ROUTES, "ticket_task": "labels", "seed": 0, "num_labels": 4}
    if kind == "bert":
        from transformers import BertConfig

        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        private = ["*LayerNorm*", "classifier.*"]
        config = BertConfig(**small, vocab_size=40)
        model = RTLModelForSequenceClassification.from_backbone(config, private_parameters=private, **options)
    else:  # A convolution is private too.
        model = RTLModelForImageClassification.from_backbone(
            SMALL_NET,
            prune_exclude=["*conv1*"],
            private_parameters=["*bn*", "*.fc.*", "*conv1*"],
            **options,
        )
    fill_masks(model, keep=0.2)
    spread_rows(model)
    return model.eval()


@torch.no_grad()
def outputs(model, route):
    if model.main_input_name == "input_ids":
        return model(input_ids=torch.arange(8).view(2, 4), route_ids=route).logits
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(pixel_values=images.to(model.dtype), route_ids=route).logits


def assert_same_rows(one, other):
    assert one.private_parameters.names == other.private_parameters.names
    pairs = list(zip(one.private_parameters.rows, other.private_parameters.rows, strict=True))
    assert pairs and all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        *((how, torch.float32) for how in ("full", "compact", "sharded")),
        *(("full", dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_save_and_load_is_bit_exact(fill_masks, tmp_path, kind, how, dtype):
    model = models(kind, fill_masks).to(dtype)
    arguments = {"compact": {"compact": True}, "sharded": {"max_shard_size": "5KB"}}.get(how, {})
    model.save_pretrained(tmp_path, **arguments)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert_same_rows(loaded, model)
    assert loaded.config.private_parameters == model.config.private_parameters != []
    for route in (0, 1, 2, UNION):
        assert torch.equal(outputs(loaded, route), outputs(model, route))
    # The same parameters are trained.
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == names


def test_loading_in_another_type(fill_masks, tmp_path):
    model = models("timm", fill_masks)
    model.save_pretrained(tmp_path)
    assert_same_rows(RTLModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16())


def test_a_checkpoint_of_other_private_parameters_is_refused(fill_masks, tmp_path):
    model = models("timm", fill_masks)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rows = tensors["private_parameters.p0001"]
    for changed, message in (
        ({"private_parameters.p0001": None}, "lacks 1 tensor.*p0001"),
        ({"private_parameters.p0001": rows[:2].clone()}, "wrong sizes of 1 tensor.*p0001"),
        ({"private_parameters.p0999": rows.clone()}, "has unknown 1 tensor.*p0999"),
    ):
        kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            RTLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_an_extracted_ticket_is_bit_equal_and_shares_nothing(fill_masks, kind, layout):
    model = models(kind, fill_masks).to(memory_format=layout)
    for route in (0, "bee", UNION):
        ticket = model.extract_ticket(route)
        inputs = {"input_ids": torch.arange(8).view(2, 4)}
        if kind == "timm":
            inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
        assert torch.equal(ticket(**inputs).logits, model(**inputs, route_ids=route).logits)
        assert all(parameter.requires_grad for parameter in ticket.parameters())
        before = outputs(model, route)
        with torch.no_grad():
            for parameter in ticket.parameters():
                parameter.zero_()
        assert torch.equal(outputs(model, route), before)


def test_layers_see_rows_with_the_memory_layout_of_an_extracted_ticket(fill_masks):
    """Kernels round by memory layout and alignment, which a row inside its parameter may lack."""
    model = models("timm", fill_masks).to(memory_format=torch.channels_last)
    for rows in model.private_parameters.rows:
        rows.data = rows.data.contiguous()
    assert any(rows[1].data_ptr() % 64 for rows in model.private_parameters.rows)
    with model.route_context(1):
        for name, own in zip(
            model.private_parameters.names, model.private_parameters.own(model.backbone), strict=True
        ):
            module, _, attribute = name.rpartition(".")
            bound = getattr(model.backbone.get_submodule(module), attribute)
            assert bound.stride() == own.stride() and bound.data_ptr() % 64 == 0


def test_copies_and_casts(fill_masks):
    model = models("timm", fill_masks)
    before = outputs(model, 1)
    clone = copy.deepcopy(model)
    view = model.with_route("bee")
    with torch.no_grad():
        for rows in clone.private_parameters.rows:
            rows.zero_()
    assert torch.equal(outputs(model, 1), before) and not torch.equal(outputs(clone, 1), before)
    model.drop_route("ant")
    assert torch.equal(outputs(view, None), before)
    assert {rows.dtype for rows in model.half().private_parameters.rows} == {torch.float16}
    assert model.status()["private_parameters"] == model.private_parameters.names


@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_bytes(fill_masks, tmp_path, kind, keep):
    def bytes_in(folder):
        return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())

    model = models(kind, fill_masks)
    fill_masks(model, keep=keep)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "compact", compact=True)
    model.save_tickets(tmp_path / "tickets")
    footprint = model.footprint()
    assert {name: bytes_in(tmp_path / name) for name in ("full", "compact", "tickets")} == {
        name: footprint[f"{name}_bytes"] for name in ("full", "compact", "tickets")
    }
    # Tickets need K rows in place of each shared parameter.
    aliases = parameter_aliases(model.backbone)
    sizes = {name: 4 * model.backbone.get_parameter(name).numel() for name in aliases}
    private = sum(sizes[name] for name in model.private_parameters.names)
    shared = sum(size for name, size in sizes.items()) - 4 * model.mask_bank.num_weights - private
    statistics = 0 if model.norm_statistics is None else sum(rows.nbytes for rows in model.norm_statistics.rows)
    others = sum(b.nbytes for name, b in model.backbone.state_dict().items() if name not in aliases)
    assert footprint["dense_bytes"] == shared + 3 * private + statistics + (0 if statistics else others)
    plain = sum(tensor.nbytes for tensor in model.extract_ticket(0).state_dict().values())
    assert footprint["independent_full_bytes"] == 3 * plain


# Adding and dropping routes


def new_ticket(model, seed=3):
    """Masks, statistics and private parameters of a ticket for `model`, of norms and head."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(shape, generator=generator) < 0.2 for shape in model.mask_bank.shapes]
    names = [name for name in parameter_aliases(model.backbone) if ".bn" in name or ".fc." in name]
    row = {name: torch.randn(model.backbone.get_parameter(name).shape, generator=generator) for name in names}
    rows = model.norm_statistics.rows
    statistics = [torch.rand(row[0].shape, generator=generator).to(row.dtype) + 1 for row in rows]
    return masks, {"statistics": statistics, "private_parameters": row}


def test_routes_come_and_go(fill_masks, tmp_path):
    model = models("timm", fill_masks)
    before = {route: outputs(model, route) for route in ROUTES}
    old = dict(zip(model.private_parameters.names, model.private_parameters.rows, strict=True))
    own = dict(zip(model.private_parameters.names, model.private_parameters.own(model.backbone), strict=True))
    model.drop_route("bee")
    masks, rest = new_ticket(model)
    model.append_ticket("dog", masks, **rest)
    assert model.private_parameters.num_routes == 3
    for name, rows in zip(model.private_parameters.names, model.private_parameters.rows, strict=True):
        assert torch.equal(rows[:2], old[name][[0, 2]]) and rows.requires_grad
        assert torch.equal(rows[2], rest["private_parameters"].get(name, own[name]))
    assert all(torch.equal(outputs(model, route), before[route]) for route in ("ant", "cat"))
    ticket = model.extract_ticket("dog")
    for name, row in rest["private_parameters"].items():
        assert torch.equal(ticket.get_parameter(name), row)
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert all(torch.equal(outputs(loaded, route), outputs(model, route)) for route in (0, 1, 2, UNION))


def shared_model(fill_masks):
    options = {"route_names": ROUTES, "ticket_task": "labels", "seed": 0, "num_labels": 4}
    model = RTLModelForImageClassification.from_backbone(SMALL_NET, **options)
    fill_masks(model, keep=0.2)
    spread_rows(model)
    return model.eval()


def test_what_was_shared_becomes_private_with_a_ticket_that_brings_its_own(fill_masks, tmp_path):
    model = shared_model(fill_masks)
    before = {route: outputs(model, route) for route in (0, 1, 2)}
    base, view = copy.deepcopy(model), model.with_route("bee")
    masks, rest = new_ticket(model)
    model.append_ticket("dog", masks, **rest)
    assert model.private_parameters.names == list(rest["private_parameters"])
    assert all(torch.equal(outputs(model, route), before[route]) for route in (0, 1, 2))
    assert torch.equal(outputs(view, None), before[1])
    assert not any(parameter.requires_grad for parameter in model.private_parameters.own(model.backbone))
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert_same_rows(loaded, model)
    assert all(torch.equal(outputs(loaded, route), outputs(model, route)) for route in (0, 1, 2, 3, UNION))
    with pytest.raises(ValueError, match=r"'timm_model.fc.bias' \(3,\), expected \(4,\)"):
        base.append_ticket("dog", masks, **{**rest, "private_parameters": {"timm_model.fc.bias": torch.zeros(3)}})
    assert base.route_names == ROUTES and not base.private_parameters.names and not base.config.private_parameters


def test_parameters_become_private_one_after_the_other(fill_masks, tmp_path):
    model = shared_model(fill_masks)
    before = {route: outputs(model, route) for route in (0, 1, 2, UNION)}
    for patterns in (["*.fc.*"], ["*bn*"], ["*.fc.bias"]):
        model.make_private(patterns)
    assert all(torch.equal(outputs(model, route), before[route]) for route in before)
    names = [name for name, _ in model.backbone.named_parameters() if ".bn" in name or ".fc." in name]
    assert model.private_parameters.names == names and model.config.private_parameters == ["*.fc.*", "*bn*"]
    spread_rows(model)
    model.save_pretrained(tmp_path)
    assert_same_rows(RTLModel.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="matches no parameter"):
        model.make_private(["*nonsense*"])
    with pytest.raises(ValueError, match="view with a fixed route"):
        model.with_route(0).make_private(["*conv*.bias"])
    with model.route_context(0), pytest.raises(RuntimeError, match="inside a route_context"):
        model.make_private(["*.bias"])


@pytest.mark.parametrize(
    ("base_shares", "copy_of_base"), [(True, "full"), (True, "compact"), (False, "full"), (False, "bfloat16")]
)
def test_a_ticket_file_brings_private_parameters(fill_masks, tmp_path, base_shares, copy_of_base):
    """The copy of the base may have private parameters or share all: it is the same base."""
    base = shared_model(fill_masks) if base_shares else models("timm", fill_masks)
    base.save_pretrained(tmp_path / "base", compact=copy_of_base == "compact")
    author = RTLModel.from_pretrained(tmp_path / "base")
    masks, rest = new_ticket(author)
    author.append_ticket("dog", masks, **rest, brings_weights=True)
    author.save_pretrained(tmp_path / "author")
    assert author.config.base == base.config.base
    author.save_tickets(tmp_path / "tickets", ["dog"])
    dtype = torch.bfloat16 if copy_of_base == "bfloat16" else torch.float32
    user = RTLModel.from_pretrained(tmp_path / "base", dtype=dtype)
    before = {route: outputs(user, route) for route in ROUTES}
    assert user.load_tickets(tmp_path / "tickets") == ["dog"]
    reference = RTLModel.from_pretrained(tmp_path / "author", dtype=dtype)
    assert_same_rows(user, reference)
    assert torch.equal(outputs(user, "dog"), outputs(reference, "dog"))
    assert all(torch.equal(outputs(user, route), before[route]) for route in ROUTES)
    # Again, since the model has these private parameters now.
    user.load_tickets(tmp_path / "tickets", rename={"dog": "wolf"})
    assert torch.equal(outputs(user, "wolf"), outputs(reference, "dog"))


def test_tickets_of_a_model_that_shares_go_to_one_that_does_not(fill_masks, tmp_path):
    """Their rows are the shared parameters of the base."""
    base = shared_model(fill_masks)
    base.save_pretrained(tmp_path / "base")
    base.save_tickets(tmp_path / "tickets")
    user = RTLModel.from_pretrained(tmp_path / "base")
    masks, rest = new_ticket(user)
    user.append_ticket("dog", masks, **rest)
    user.drop_route("bee")
    user.load_tickets(tmp_path / "tickets", ["bee"])
    assert torch.equal(outputs(user, "bee"), outputs(base, "bee"))


def test_foreign_and_damaged_private_parameters_are_refused(fill_masks, tmp_path):
    model = models("timm", fill_masks)
    index = model.save_tickets(tmp_path)
    assert index["private_parameters"] == model.private_parameters.names
    user = models("timm", fill_masks)
    user.drop_route("cat")
    for name, message in (
        ("timm_model.fc.bias2", "another backbone: they bring timm_model.fc.bias2"),
        ("timm_model.conv1.0.weight", "another backbone: they bring timm_model.conv1.0.weight"),
        ("timm_model.conv2.0.weight", "another backbone: they bring timm_model.conv2.0.weight"),
        ("timm_model.fc.weight", "ticket-002.safetensors of .* is damaged"),
        (3, "tickets.json of .* is damaged"),
    ):
        (tmp_path / "tickets.json").write_text(json.dumps({**index, "private_parameters": [name]}))
        with pytest.raises(ValueError, match=message):
            user.load_tickets(tmp_path, ["cat"])
    assert user.route_names == ["ant", "bee"] and user.private_parameters.num_routes == 2
