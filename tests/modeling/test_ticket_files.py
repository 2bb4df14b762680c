"""Tickets in files of their own, which any copy of their base can load, and no other model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLModelForMaskedLM, RTLModelForSequenceClassification
from hf_rtl.model_card.readme import Readme
from hf_rtl.model_card.ticket_page import tickets_page
from hf_rtl.modeling.files import write_tensors
from hf_rtl.modeling.mask_coding import decode
from hf_rtl.modeling.ticket_files import read_index
from tests.training.small_runs import SMALL_NET


ROUTES = ["ant", "bee", "cat"]


def make_model(kind="timm", *, seed=0, keep=0.3, routes=ROUTES, **options):
    """A model with random masks and, as after training, different statistics for each route."""
    generator = torch.Generator().manual_seed(seed)
    options = {"route_names": routes, "ticket_task": "labels", "seed": seed, "num_labels": 4, **options}
    if kind in ("timm", "resnet"):
        backbone = {"timm": SMALL_NET, "resnet": "test_resnet"}[kind]
        model = RTLModelForImageClassification.from_backbone(backbone, **options)
    else:
        from transformers import BertConfig

        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model_class = {"bert": RTLModelForSequenceClassification, "tied": RTLModelForMaskedLM}[kind]
        if kind == "tied":
            options["prune_include"] = ["bert.embeddings.word_embeddings.weight"]
            options.pop("num_labels")
        model = model_class.from_backbone(BertConfig(**small, vocab_size=40), **options)
    for route in range(model.num_routes):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < keep for shape in model.mask_bank.shapes]
    if model.norm_statistics is not None:
        for rows in model.norm_statistics.rows:
            rows.copy_((rows + torch.rand(rows.shape, generator=generator)).to(rows.dtype))
    return model.eval()


def add_ticket(model, name, *, seed=1, keep=0.2):
    """Adds a ticket that also keeps weights outside the base, as a ticket found later does."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(shape, generator=generator) < keep for shape in model.mask_bank.shapes]
    old = model.mask_bank.union()
    with torch.no_grad():
        for weight, mask, union in zip(model.masker.weights, masks, old, strict=True):
            values = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(torch.where(mask & ~union, values, weight))
    rows = model.norm_statistics.rows
    statistics = [torch.rand(row[0].shape, generator=generator).to(row.dtype) + 1 for row in rows]
    model.append_ticket(name, masks, statistics=statistics, brings_weights=True)
    return masks


@torch.no_grad()
def outputs(model, route, kind="timm"):
    if kind in ("timm", "resnet"):
        generator = torch.Generator().manual_seed(0)
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.arange(8).view(2, 4)}
    return model(**inputs, route_ids=route).logits


def copy_state(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, model.config.to_dict(), list(model.route_names)


def assert_unchanged(model, before):
    state, config, route_names = copy_state(model)
    assert config == before[1] and route_names == before[2] and state.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())


# Loading into copies of the base


COPIES = ["full", "compact", "bfloat16", "float16", "bfloat16 and back"]
SHORT = [("bert", "full"), ("bert", "float16"), ("tied", "compact"), ("tied", "bfloat16 and back")]


@pytest.mark.parametrize(
    ("kind", "copy"),
    [
        pytest.param(kind, copy, marks=[] if kind == "timm" or (kind, copy) in SHORT else pytest.mark.long)
        for kind in ("timm", "bert", "tied")
        for copy in COPIES
    ],
)
def test_tickets_added_to_a_copy_answer_as_where_they_were_made(kind, copy, tmp_path):
    base = make_model(kind)
    base.save_pretrained(tmp_path / "base", compact=copy == "compact")
    author = RTLModel.from_pretrained(tmp_path / "base")
    add_ticket(author, "dog")
    author.save_tickets(tmp_path / "tickets", ["dog"])
    author.save_pretrained(tmp_path / "author")

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(copy.split()[0], torch.float32)
    user = RTLModel.from_pretrained(tmp_path / "base", dtype=dtype)
    reference = RTLModel.from_pretrained(tmp_path / "author", dtype=dtype)
    if copy == "bfloat16 and back":
        user, reference = user.float(), reference.float()
        for weight, cast in zip(reference.masker.weights, user.masker.weights, strict=True):
            assert weight.dtype == cast.dtype == torch.float32
    before = {route: outputs(user, route, kind) for route in ROUTES}
    assert user.load_tickets(tmp_path / "tickets") == ["dog"]
    assert user.route_names == [*ROUTES, "dog"] and user.config.added_routes == ["dog"]
    if copy == "bfloat16 and back":
        # The weights that the ticket brings are not rounded.
        assert torch.isclose(outputs(user, "dog", kind), outputs(reference, "dog", kind), atol=0.05).all()
    else:
        assert torch.equal(outputs(user, "dog", kind), outputs(reference, "dog", kind))
    for route in ROUTES:
        assert torch.equal(outputs(user, route, kind), before[route])
    for rows, own in zip(user.norm_statistics.rows, reference.norm_statistics.rows, strict=True):
        assert torch.equal(rows, own)
    # The model can be saved and loaded as any other.
    user.save_pretrained(tmp_path / "user", compact=True)
    again = RTLModel.from_pretrained(tmp_path / "user")
    assert all(torch.equal(outputs(again, route, kind), outputs(user, route, kind)) for route in (0, 1, 2, 3, -1))


def test_tickets_of_the_base_itself_can_be_dropped_and_added_again(tmp_path):
    model = make_model()
    model.config.thresholds = None
    model.save_tickets(tmp_path)
    before = {route: outputs(model, route) for route in ROUTES}
    fingerprint = model.mask_bank.fingerprint()
    for route in ROUTES[:2]:
        model.drop_route(route)
    assert model.load_tickets(tmp_path, ["bee", "ant"]) == ["bee", "ant"]
    assert model.route_names == ["cat", "bee", "ant"] and model.config.added_routes == []
    assert all(torch.equal(outputs(model, route), before[route]) for route in ROUTES)
    model.mask_bank.reorder(ROUTES)
    assert model.mask_bank.fingerprint() == fingerprint


def test_membership_tickets_bring_their_threshold_and_name(tmp_path):
    model = make_model(ticket_task="membership", num_labels=1)
    model.config.thresholds = [0.5, -1.0, 2.0]
    model.save_tickets(tmp_path)
    other = make_model(ticket_task="membership", num_labels=1)
    other.load_tickets(tmp_path, ["bee"], rename={"bee": "wasp"})
    assert other.config.thresholds == [0.0, 0.0, 0.0, -1.0]
    assert other.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "wasp"} and other.config.num_labels == 4
    assert outputs(other, None).shape == (2, 4)
    assert torch.equal(outputs(other, "wasp"), outputs(model, "bee"))


def test_statistics_that_are_shared_are_of_the_base(tmp_path):
    model = make_model(norm_statistics="shared")
    model.save_tickets(tmp_path, ["bee"])
    other = make_model(norm_statistics="shared")
    other.drop_route("bee")
    other.load_tickets(tmp_path)
    assert torch.equal(outputs(other, "bee"), outputs(model, "bee"))
    other.drop_route("bee")
    next(buffer for name, buffer in other.backbone.named_buffers() if "running_var" in name).mul_(2)
    with pytest.raises(ValueError, match=r"another base .* 1 tensor\(s\) differ \(.*running_var\)"):
        other.load_tickets(tmp_path)


@pytest.mark.slow
def test_tickets_of_several_authors_meet_in_one_model(tmp_path):
    make_model("resnet", keep=0.1).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(["dog", "eel"]):
        author = RTLModel.from_pretrained(tmp_path / "base")
        masks = add_ticket(author, name, seed=seed, keep=0.001)
        assert sum(int(mask.sum()) for mask in masks) > 100
        author.save_tickets(tmp_path / name, [name])
        author.save_pretrained(tmp_path / f"{name}-model")
    user = RTLModel.from_pretrained(tmp_path / "base")
    for name in ("dog", "eel"):
        user.load_tickets(tmp_path / name)
    for name in ("dog", "eel"):
        author = RTLModel.from_pretrained(tmp_path / f"{name}-model")
        assert torch.equal(outputs(user, name), outputs(author, name))
    # The files of both tickets name the same base, whatever was added to it.
    index = read_index(tmp_path / "eel")
    assert index["base"]["fingerprint"] == read_index(tmp_path / "dog")["base"]["fingerprint"]
    user.save_tickets(tmp_path / "both", ["dog", "eel"])
    assert read_index(tmp_path / "both")["base"] == index["base"]


def test_a_base_may_have_fewer_routes_than_its_author(tmp_path):
    """Tickets outside a small base bring their weights along."""
    whole = make_model()
    whole.save_tickets(tmp_path / "tickets", ["bee", "cat"], base_routes=["ant"])
    small = make_model()
    for route in ("bee", "cat"):
        small.drop_route(route)
    small.save_pretrained(tmp_path / "small", compact=True)
    user = RTLModel.from_pretrained(tmp_path / "small")
    user.load_tickets(tmp_path / "tickets")
    assert all(torch.equal(outputs(user, route), outputs(whole, route)) for route in ROUTES)
    tickets = read_index(tmp_path / "tickets")["tickets"]
    only_in_bee = sum(
        int((bee & ~ant).sum()) for bee, ant in zip(whole.mask_bank["bee"], whole.mask_bank["ant"], strict=True)
    )
    assert tickets[0]["added"] == only_in_bee > 0


# Files


def test_what_is_in_the_files(tmp_path):
    model = make_model(keep=0.1)
    index = model.save_tickets(tmp_path / "some" / "where")
    folder = tmp_path / "some" / "where"
    assert index == read_index(folder) == json.loads((folder / "tickets.json").read_text())
    names = {"tickets.json", "ticket-000.safetensors", "ticket-001.safetensors", "ticket-002.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    assert [ticket["name"] for ticket in index["tickets"]] == ROUTES
    assert not index["base"].keys() - {"fingerprint"}
    for route, ticket in enumerate(index["tickets"]):
        tensors = load_file(folder / ticket["file"])
        assert set(tensors) == {"mask", "statistics", "num_batches_tracked"}
        rows = torch.cat([rows[route] for rows in model.mask_bank.packed])
        assert torch.equal(decode(ticket["coding"]["mask"], tensors["mask"], len(rows)), rows)
        assert ticket["kept"] == int(model.mask_bank.count()[route]) and ticket["added"] == 0
    # A later save removes these files.
    model.save_tickets(folder, [1])
    assert {file.name for file in folder.iterdir()} == {"tickets.json", "ticket-000.safetensors"}
    assert [ticket["name"] for ticket in read_index(folder)["tickets"]] == ["bee"]


def test_a_page_of_tickets_follows_them_and_keeps_what_a_user_wrote(tmp_path):
    model = make_model()
    index = model.save_tickets(tmp_path)
    file = tmp_path / "README.md"
    assert not file.exists()  # only a push makes a card

    page = tickets_page(index, b"---\nlicense: mit # yes\n---\n# Mine\n", repo_id="ann/more").decode()
    assert page.startswith("---\nlicense: mit # yes\n") and "\n---\n# Mine\n\n<!-- hf_rtl: begin" in page
    assert "# more" not in page and "load_tickets('ann/more')" in page
    assert "a model that is not on the Hub" in page and "base_model" not in page
    by_hand = page.replace("- pruning\n", "- pruning\n- insects\n") + "\nMy own words.\n"
    file.write_bytes(by_hand.encode())
    assert tickets_page(index, file.read_bytes(), repo_id="ann/more") == file.read_bytes()

    model.config.base = {"repo": "org/base", "revision": "0" * 40, **index["base"]}
    index = model.save_tickets(tmp_path, ["bee"])
    page = file.read_text()
    kept, total = index["tickets"][0]["kept"], model.mask_bank.num_weights
    assert [line for line in page.splitlines() if line.startswith("| ")][2:] == [
        f"| bee | {kept:,} | {kept / total:.1%} | 0 |"
    ]
    assert page.startswith("---\nlicense: mit # yes\n") and page.endswith("hf_rtl: end -->\n\nMy own words.\n")
    readme = Readme.parse(page.encode())
    assert readme.before == "# Mine\n\n" and {"insects", "tickets"} <= set(readme.metadata["tags"])
    assert (readme.metadata["base_model"], readme.metadata["base_model_relation"]) == ("org/base", "adapter")
    assert "load_tickets('ann/more')" in page and "from_pretrained('org/base')" in page
    assert b"load_tickets('ann/other')" in tickets_page(index, file.read_bytes(), repo_id="ann/other")


def test_other_pages_are_left_alone(tmp_path):
    model = make_model()
    of_a_model = Readme().with_generated("A model", {"license": "mit"}, {"given": {}, "metadata": {}})
    for content in (of_a_model, b"# A folder of mine\n"):
        (tmp_path / "README.md").write_bytes(content)
        index = model.save_tickets(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == content
    assert tickets_page(index, of_a_model, repo_id="org/model") is None

    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "README.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="README.md must be text in UTF-8"):
        model.save_tickets(tmp_path, ["bee"])
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after == {**before, "README.md": b"\xff"}


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.1])
def test_a_ticket_takes_about_a_bit_per_weight_and_less_where_it_is_sparse(keep, tmp_path):
    model = make_model("resnet", keep=keep)
    model.save_tickets(tmp_path)
    entropy = -keep * math.log2(keep) - (1 - keep) * math.log2(1 - keep)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        beside_mask = sum(tensor.nbytes for name, tensor in tensors.items() if name != "mask")
        bits = 8 * (file.stat().st_size - beside_mask) / model.mask_bank.num_weights  # with the header of the file
        assert bits < 1.05 and bits < 1.1 * entropy


# Refused tickets, which change nothing


@pytest.mark.parametrize(
    "change, tensor",
    [
        (lambda model: model.masker.weights[1], None),
        (lambda model: dict(model.backbone.named_parameters())["timm_model.fc.weight"], "timm_model.fc.weight"),
        (lambda model: dict(model.backbone.named_parameters())["timm_model.fc.bias"], "timm_model.fc.bias"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_is_refused_naming_what_differs(change, tensor, dtype, tmp_path):
    make_model().save_tickets(tmp_path, ["bee"])
    user = make_model(routes=["ant", "wasp", "cat"]).to(dtype)
    name = tensor or user.mask_bank.weight_names[1]
    with torch.no_grad():
        changed = change(user)
        position = int(make_model().mask_bank["bee"][1].view(-1).nonzero()[0]) if tensor is None else 0
        changed.view(-1)[position] += 1
    before = copy_state(user)
    with pytest.raises(ValueError, match=rf"from another base than this model: .* 1 tensor\(s\) differ \({name}\)"):
        user.load_tickets(tmp_path)
    assert_unchanged(user, before)


def test_weights_that_the_ticket_prunes_may_differ(tmp_path):
    make_model().save_tickets(tmp_path, ["bee"])
    user = make_model(routes=["ant", "wasp", "cat"])
    with torch.no_grad():
        for weight, mask in zip(user.masker.weights, user.mask_bank["wasp"], strict=True):
            weight.copy_(torch.where(mask, weight, 7.0))
    user.load_tickets(tmp_path)
    assert torch.equal(outputs(user, "bee"), outputs(make_model(), "bee"))


def test_a_compact_copy_without_the_weights_is_refused(tmp_path):
    model = make_model()
    model.save_tickets(tmp_path / "tickets", ["bee"])
    model.drop_route("bee")
    model.save_pretrained(tmp_path / "rest", compact=True)
    with pytest.raises(ValueError, match=r"another base than this model: .* tensor\(s\) differ"):
        RTLModel.from_pretrained(tmp_path / "rest").load_tickets(tmp_path / "tickets")


def test_tickets_that_want_other_values_in_the_same_place_are_refused(tmp_path):
    make_model(keep=0.1).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(["dog", "eel"]):
        author = RTLModel.from_pretrained(tmp_path / "base")
        add_ticket(author, name, seed=seed)
        author.save_tickets(tmp_path / name, [name])
    user = RTLModel.from_pretrained(tmp_path / "base")
    user.load_tickets(tmp_path / "dog")
    before = copy_state(user)
    with pytest.raises(
        ValueError, match="'eel' brings .* weights of .* another ticket of this model keeps with other"
    ):
        user.load_tickets(tmp_path / "eel")
    assert_unchanged(user, before)
    user.drop_route("dog")
    user.load_tickets(tmp_path / "eel")
    # The same ticket twice does not contradict itself.
    assert user.load_tickets(tmp_path / "eel", rename="auto") == ["eel-2"]
    assert torch.equal(outputs(user, "eel"), outputs(user, "eel-2"))


def test_tickets_of_one_folder_that_contradict_each_other_are_refused(tmp_path):
    make_model(keep=0.1).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(["dog", "eel"]):
        author = RTLModel.from_pretrained(tmp_path / "base")
        add_ticket(author, name, seed=seed)
        author.save_tickets(tmp_path / name, [name])
    (tmp_path / "eel" / "ticket-000.safetensors").rename(tmp_path / "dog" / "ticket-001.safetensors")
    eel = {**read_index(tmp_path / "eel")["tickets"][0], "file": "ticket-001.safetensors"}
    damaged_index(tmp_path / "dog", lambda index: index["tickets"].append(eel))
    user = RTLModel.from_pretrained(tmp_path / "base")
    before = copy_state(user)
    with pytest.raises(ValueError, match="'eel' brings .* weights"):
        user.load_tickets(tmp_path / "dog")
    assert_unchanged(user, before)
    assert user.load_tickets(tmp_path / "dog", ["eel"]) == ["eel"]


def test_other_kinds_of_models_are_refused(tmp_path):
    make_model().save_tickets(tmp_path, ["bee"])
    for options, message in (
        ({"ticket_task": "membership", "num_labels": 1}, "have ticket_task='labels', but the model has 'membership'"),
        ({"norm_statistics": "shared"}, "have norm_statistics='per_route', but the model has 'shared'"),
        ({"prune_exclude": ["*conv1*"]}, "are for another backbone: .*conv1"),
        ({"kind": "bert"}, "are for another backbone"),
    ):
        user = make_model(routes=["x", "y"], **options)
        with pytest.raises(ValueError, match=message):
            user.load_tickets(tmp_path)


def test_names_in_conflict_are_an_error_that_shows_the_call(tmp_path):
    model = make_model()
    model.save_tickets(tmp_path)
    before = copy_state(model)
    with pytest.raises(ValueError, match=r"has a route 'ant' already.*`rename=\{'ant': 'ant-2'\}`"):
        model.load_tickets(tmp_path)
    with pytest.raises(ValueError, match=r"has a route 'bee' already"):
        model.load_tickets(tmp_path, ["cat"], rename={"cat": "bee"})
    with pytest.raises(ValueError, match=r"`rename` has 'dog', but the tickets are 'cat'"):
        model.load_tickets(tmp_path, ["cat"], rename={"dog": "eel"})
    for wrong in ("numbers", ["cat"], {"ant": "eel", "bee": ""}, {"ant": "eel", "bee": 3}):
        with pytest.raises(ValueError, match=r"`rename` must be 'auto' or a dict"):
            model.load_tickets(tmp_path, ["ant", "bee"], rename=wrong)
    for routes in (["dog"], "cat", ["cat", "cat"]):
        with pytest.raises(ValueError, match=r"`routes` = .* must be a list of names of 'ant', 'bee', 'cat'"):
            model.load_tickets(tmp_path, routes)
    assert_unchanged(model, before)
    assert model.load_tickets(tmp_path, ["cat"], rename={"cat": "lynx"}) == ["lynx"]
    assert model.load_tickets(tmp_path, rename="auto") == ["ant-2", "bee-2", "cat-2"]
    assert model.load_tickets(tmp_path, ["cat"], rename="auto") == ["cat-3"]
    assert all(torch.equal(outputs(model, name), outputs(model, "cat")) for name in ("lynx", "cat-2", "cat-3"))


def damaged_index(folder, change):
    index = json.loads((folder / "tickets.json").read_text())
    change(index)
    (folder / "tickets.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda index: index.update(format_version=3),
            "format 3; this is hf_rtl .*, which reads formats up to 2",
        ),
        (lambda index: index.pop("tickets"), "tickets.json of .* is damaged"),
        (lambda index: index.pop("dense"), "tickets.json of .* is damaged"),
        (lambda index: index["tickets"][0].pop("coding"), "tickets.json of .* is damaged"),
        (lambda index: index["tickets"][0].update(file="../ticket-000.safetensors"), "tickets.json of .* is damaged"),
        (lambda index: index["tickets"][0].update(file="ticket-001.safetensors"), "ticket-001.* is damaged"),
        (lambda index: index["dense"].pop("timm_model.fc.bias"), r"another base .* differ \(timm_model.fc.bias\)"),
        (lambda index: index["dense"].update(more={}), r"another base .* differ \(more\)"),
        (lambda index: index["tickets"][0].update(kept=5), "ticket-000.safetensors of .* is damaged"),
        (lambda index: index["tickets"][0]["coding"].update(mask="pickle"), "must be one of 'raw', 'deflate'"),
    ],
)
def test_a_damaged_or_newer_index_is_refused(change, message, tmp_path):
    make_model().save_tickets(tmp_path)
    damaged_index(tmp_path, change)
    user = make_model(routes=["x", "y", "z"])
    before = copy_state(user)
    with pytest.raises(ValueError, match=message):
        user.load_tickets(tmp_path, ["ant"])
    assert_unchanged(user, before)


def test_an_index_that_says_odd_things_is_refused_before_anybody_reads_it(tmp_path):
    make_model().save_tickets(tmp_path)
    whole = (tmp_path / "tickets.json").read_text()
    odd = {
        "base": [None, {"repo": "org/base", "revision": 3}],
        "ticket_task": [None],
        "weights": [[], "abc", [1], [["a"]], [["a", "b"]], [["a", [0]]], [[1, [2]]]],
        "dense": [["a"]],
        "tickets": [{}, ["a"]],
    }
    odd_of_a_ticket = {
        "name": ["", 5, ["a"], "ant"],
        "file": [3],
        "kept": ["3", None],
        "added": [True],
        "coding": [None],
        "in_base": ["abc"],
        "threshold": ["1", math.nan, math.inf, [0]],
    }
    for key, values in odd.items():
        for value in values:
            damaged_index(tmp_path, lambda index, key=key, value=value: index.update({key: value}))
            with pytest.raises(ValueError, match="tickets.json of .* is damaged"):
                read_index(tmp_path)
            (tmp_path / "tickets.json").write_text(whole)
    for key, values in odd_of_a_ticket.items():
        for value in values:
            damaged_index(tmp_path, lambda index, key=key, value=value: index["tickets"][1].update({key: value}))
            with pytest.raises(ValueError, match="tickets.json of .* is damaged"):
                read_index(tmp_path)
            (tmp_path / "tickets.json").write_text(whole)
        damaged_index(tmp_path, lambda index, key=key: index["tickets"][1].pop(key))
        with pytest.raises(ValueError, match="tickets.json of .* is damaged"):
            read_index(tmp_path)
        (tmp_path / "tickets.json").write_text(whole)


def test_damaged_files_are_refused(tmp_path):
    model = make_model()
    model.save_tickets(tmp_path / "tickets")
    file = tmp_path / "tickets" / "ticket-001.safetensors"
    whole = file.read_bytes()
    user = make_model(routes=["x", "y", "z"])
    before = copy_state(user)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for content in (whole[:-9], bytes(flipped), b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="ticket-001.safetensors of .* is damaged"):
            user.load_tickets(tmp_path / "tickets")
    write_tensors(file, {**tensors, "mask": tensors["mask"].double()})  # whole, but of another kind
    with pytest.raises(ValueError, match="ticket-001.safetensors of .* is damaged: a coded mask must be torch.uint8"):
        user.load_tickets(tmp_path / "tickets")
    save_file(tensors, file)  # whole, but without the hash that hf_rtl writes
    with pytest.raises(ValueError, match="ticket-001.safetensors of .* is damaged"):
        user.load_tickets(tmp_path / "tickets")
    assert_unchanged(user, before)
    assert user.load_tickets(tmp_path / "tickets", ["ant"]) == ["ant"]
    for empty in (tmp_path, tmp_path / "nothing"):
        with pytest.raises((ValueError, OSError), match="holds no tickets|nothing"):
            user.load_tickets(empty)


def test_bad_arguments_of_saving_write_nothing(tmp_path):
    model = make_model()
    for arguments, error, message in (
        ((["dog"],), ValueError, "unknown route 'dog'; the routes are 'ant', 'bee', 'cat'"),
        (("bee",), TypeError, r"`routes` must be a list of routes, got 'bee'; for one write \['bee'\]"),
        (([1, "bee"],), ValueError, "names a route twice"),
    ):
        with pytest.raises(error, match=message):
            model.save_tickets(tmp_path / "tickets", *arguments)
    with pytest.raises(ValueError, match="unknown route 'dog'"):
        model.save_tickets(tmp_path / "tickets", base_routes=["dog"])
    for action in ("save_tickets", "load_tickets"):
        with pytest.raises(ValueError, match="on a view with a fixed route"):
            getattr(model.with_route("bee"), action)(tmp_path / "tickets")
        with model.route_context("bee"), pytest.raises(RuntimeError, match="inside a route_context"):
            getattr(model, action)(tmp_path / "tickets")
    assert not list(tmp_path.iterdir())


# Adding and dropping routes


def test_routes_come_and_go(tmp_path):
    model = make_model(ticket_task="membership", num_labels=1)
    model.config.thresholds = [1.0, 2.0, 3.0]
    rows = [rows.clone() for rows in model.norm_statistics.rows]
    before = {route: outputs(model, route) for route in ROUTES}
    union_row = [row[-1].clone() for row in rows]
    model.drop_route("bee")
    assert model.route_names == model.config.route_names == ["ant", "cat"] and model.config.thresholds == [1.0, 3.0]
    assert model.config.id2label == {0: "ant", 1: "cat"} and model.norm_statistics.num_routes == 2
    for row, old in zip(model.norm_statistics.rows, rows, strict=True):
        assert torch.equal(row, old[[0, 2, 3]])
    assert all(torch.equal(outputs(model, route), before[route]) for route in ("ant", "cat"))
    model.append_ticket("new", model.mask_bank["cat"], statistics=[row[2] for row in rows])
    assert torch.equal(outputs(model, "new"), before["cat"]) and model.config.thresholds == [1.0, 3.0, 0.0]
    assert all(torch.equal(row[-1], own) for row, own in zip(model.norm_statistics.rows, union_row, strict=True))
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert loaded.route_names == ["ant", "cat", "new"] and torch.equal(outputs(loaded, "new"), before["cat"])
    unchanged = copy_state(model)
    with pytest.raises(ValueError, match="'ant' more than once"):
        model.append_ticket("ant", model.mask_bank["cat"], statistics=[row[2] for row in rows])
    with pytest.raises(ValueError, match="`masks` has 1 tensors, expected"):
        model.append_ticket("owl", model.mask_bank["cat"][:1], statistics=[row[2] for row in rows])
    with pytest.raises(ValueError, match="unknown route 'owl'"):
        model.drop_route("owl")
    assert_unchanged(model, unchanged)
    model.drop_route(0)
    with pytest.raises(ValueError, match="needs at least two routes"):
        model.drop_route(0)
    assert model.route_names == ["cat", "new"]


def test_the_last_route_stays():
    model = make_model(routes=["only"])
    with pytest.raises(ValueError, match="at least one route is needed"):
        model.drop_route("only")
    assert model.route_names == ["only"]


# The base of a model


@pytest.mark.slow
def test_the_base_is_known_after_casts_and_compaction_and_not_after_training(tmp_path):
    model = make_model(keep=0.1)
    model.save_pretrained(tmp_path / "base")
    base = model.config.base
    assert set(base["fingerprint"]) == {"float32", "bfloat16", "float16"}
    cast = RTLModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    cast.save_pretrained(tmp_path / "cast", compact=True)
    back = RTLModel.from_pretrained(tmp_path / "cast", dtype=torch.float32)
    add_ticket(back, "dog")
    back.save_pretrained(tmp_path / "back")
    for copy in (cast, back, RTLModel.from_pretrained(tmp_path / "back")):
        assert copy.config.base == base
    # The base has the weights that a ticket keeps or that no mask covers, but not those that all tickets prune.
    outside, inside, dense = (make_model(keep=0.1) for _ in range(3))
    union = model.mask_bank.union()[0]
    with torch.no_grad():
        outside.masker.weights[0].view(-1)[int((~union).view(-1).nonzero()[0])] += 1
        inside.masker.weights[0].view(-1)[int(union.view(-1).nonzero()[0])] += 1e-6
        next(p for name, p in dense.backbone.named_parameters() if name.endswith("fc.bias")).add_(1e-6)
    for changed, same in ((outside, True), (inside, False), (dense, False)):
        changed.save_pretrained(tmp_path / "changed")
        assert (changed.config.base == base) is same
    dropped = RTLModel.from_pretrained(tmp_path / "base")
    dropped.drop_route("ant")
    dropped.save_pretrained(tmp_path / "dropped")
    assert dropped.config.base != base


@pytest.mark.parametrize("statistics", [(), [torch.zeros(8)], "of another model"])
def test_a_ticket_with_other_statistics_changes_nothing(statistics):
    model = make_model()
    if statistics == "of another model":
        statistics = [torch.zeros(2, *row.shape) for row in model.norm_statistics.row(0)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`statistics` has tensors of shapes .*, expected .*\.row\(0\)"):
        model.append_ticket("dusk", model.mask_bank[0], statistics=statistics)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert model.config.route_names == model.route_names
