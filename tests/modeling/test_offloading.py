"""Models whose weights accelerate brings only while a layer computes."""

import accelerate
import pytest
import torch
from transformers import ResNetConfig

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLTrainer
from hf_rtl.modeling.routers import CentroidRouter
from tests.modeling.naive import BATCH, assert_nothing_is_left
from tests.training.small_runs import arguments


@pytest.fixture
def saved(request, zoo, fill_masks, tmp_path):
    """A model with statistics, tied weights or private parameters, the folder with it, and inputs."""
    if request.param == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        routes = {"route_names": ["x", "y", "z"], "ticket_task": "labels"}
        model = RTLModelForImageClassification.from_backbone(config, **routes)
        fill_masks(model)
        for rows in model.norm_statistics.buffers():
            rows += torch.arange(len(rows)).view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
        inputs = {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    else:
        private = {"private_parameters": ["*.bias"]} if request.param == "gpt2" else {}
        model, _, inputs = zoo(request.param, torch.float32, **private)
        for rows in model.private_parameters.rows:
            rows.data += torch.randn_like(rows)
        del inputs["labels"]
    model.eval().save_pretrained(tmp_path / "model")
    return model, tmp_path, inputs


def offloaded(way, folder):
    if way in ("auto", "disk"):
        where = {"device_map": "auto", "max_memory": {"cpu": "8KB"}} if way == "auto" else {"device_map": {"": "disk"}}
        return RTLModel.from_pretrained(folder / "model", offload_folder=folder / "offloaded", **where)
    model = RTLModel.from_pretrained(folder / "model")
    if way == "cpu_offload":
        return accelerate.cpu_offload(model)
    if way == "disk_offload":
        return accelerate.disk_offload(model, folder / "offloaded")
    if way == "backbone":
        accelerate.cpu_offload(model.backbone)
    elif way == "hook":
        model, _ = accelerate.cpu_offload_with_hook(model, "cpu")
    return model


@pytest.mark.parametrize(
    "saved, way",
    [
        ("resnet", "auto"),
        ("resnet", "cpu_offload"),
        ("t5", "disk"),
        ("t5", "cpu_offload"),
        ("gpt2", "auto"),
        ("gpt2", "disk_offload"),
        ("gpt2", "backbone"),
        ("gpt2", "hook"),
    ],
    indirect=["saved"],
)
def test_outputs_are_those_of_the_model_in_memory(saved, way):
    model, folder, inputs = saved
    small = offloaded(way, folder)
    assert way == "hook" or any(weight.is_meta for weight in small.masker.weights)
    before = [id(module) for module in small.modules()]
    with torch.no_grad():
        for route_ids in (0, -1, [2, 0, 2, 1]):
            assert torch.equal(
                small(**inputs, route_ids=route_ids).logits, model(**inputs, route_ids=route_ids).logits
            )
    assert_nothing_is_left(small, list(small.parameters()), dict(small.named_buffers()))
    assert [id(module) for module in small.modules()] == before
    small.set_router(CentroidRouter(3, 4))
    assert not any(buffer.is_meta for buffer in small.router.buffers())


@pytest.mark.parametrize("saved", ["gpt2"], indirect=True)
def test_what_needs_the_weights_is_refused(saved, tmp_path):
    model, folder, inputs = saved
    small = offloaded("cpu_offload", folder)
    masks = [torch.ones(shape, dtype=torch.bool) for shape in small.mask_bank.shapes]
    refused = {
        "training": lambda: small.train()(**inputs, route_ids=0),
        "saving": lambda: small.save_pretrained(tmp_path / "again"),
        "save_tickets": lambda: small.save_tickets(tmp_path / "tickets"),
        "extract_ticket": lambda: small.extract_ticket(0),
        "footprint": lambda: small.footprint(),
        "load_tickets": lambda: small.load_tickets(tmp_path),
        "append_ticket": lambda: small.append_ticket("w", masks),
        "make_private": lambda: small.make_private(["*"]),
        "mixture": lambda: small.mixture_context().__enter__(),
        "a trainer": lambda: RTLTrainer(small, arguments(tmp_path / "run")),
    }
    for action in refused.values():
        with pytest.raises(
            RuntimeError, match=r"needs the weights, and \d+ parameters are offloaded.*from_pretrained"
        ):
            action()
    with torch.no_grad():
        assert torch.equal(small.eval()(**inputs, route_ids=1).logits, model(**inputs, route_ids=1).logits)


@pytest.mark.parametrize("saved", ["resnet"], indirect=True)
def test_offloaded_buffers_and_weights_that_nothing_brings_are_refused(saved):
    model, folder, inputs = saved
    small = accelerate.cpu_offload(RTLModel.from_pretrained(folder / "model"), offload_buffers=True)
    with pytest.raises(RuntimeError, match="offload with `offload_buffers=False`"), torch.no_grad():
        small(**inputs, route_ids=0)
    small = RTLModel.from_pretrained(folder / "model")
    weight = small.masker.weights[0]
    for module, attribute in small.masker.places[0]:
        module._parameters[attribute] = torch.nn.Parameter(weight.detach().to("meta"))
    with pytest.raises(RuntimeError, match="is on the meta device, and nothing brings it"), torch.no_grad():
        small(**inputs, route_ids=0)
    assert_nothing_is_left(small, list(small.parameters()), dict(small.named_buffers()))
    for module, attribute in small.masker.places[0]:
        module._parameters[attribute] = weight
    with torch.no_grad():
        assert torch.equal(
            small(**inputs, route_ids=[1] * BATCH).logits, model(**inputs, route_ids=[1] * BATCH).logits
        )


@pytest.mark.parametrize("saved", ["gpt2"], indirect=True)
def test_offloaded_masks_are_refused_when_they_are_loaded(saved):
    _, folder, _ = saved
    places = {"backbone": "cpu", "private_parameters": "cpu", "mask_bank": "disk"}
    where = {"device_map": places, "offload_buffers": True}
    with pytest.raises(RuntimeError, match="`offload_buffers=False`"):
        RTLModel.from_pretrained(folder / "model", offload_folder=folder / "offloaded", **where)
