"""The masked optimizer step: no bit moves outside the trained tickets; inside, the update is torch's."""

import io
import math

import numpy as np
import pytest
import torch
from transformers import ViTConfig

from hf_rtl import MaskedAdamW, MaskedSGD, RTLModelForImageClassification
from hf_rtl.training import optim
from tests.training.optimizers import OPTIMIZERS, batch, bits, per_element


def small_model(num_routes=3, density=0.5, **config):
    """A tiny ViT with random masks; a tenth of the elements of every weight are in no mask."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    image = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 2}
    backbone = ViTConfig(**{**sizes, **image, "hidden_dropout_prob": 0.0, **config})
    model = RTLModelForImageClassification.from_backbone(
        backbone, route_names=[f"r{route}" for route in range(num_routes)], ticket_task="labels", seed=0
    )
    generator = torch.Generator().manual_seed(1)
    if density < 1:
        free = [torch.rand(shape, generator=generator) < 0.9 for shape in model.mask_bank.shapes]
        for route in range(num_routes):
            drawn = [torch.rand(shape, generator=generator) < density for shape in model.mask_bank.shapes]
            model.mask_bank[route] = [mask & used for mask, used in zip(drawn, free, strict=True)]
    return model.train()


def backward(model, route, seed, scale=lambda loss: loss):
    with model.route_context(route):
        scale(model(**batch(seed)).loss).backward()


def snapshot(model, optimizer):
    """The bits of every prunable weight and of its optimizer state; missing state counts as zero."""
    return [
        {name: bits(value).clone() for name, value in {"weight": weight, **per_element(optimizer, weight)}.items()}
        for weight in model.masker.weights
    ]


def assert_moved_only_inside(model, optimizer, before, masks):
    """Checks that no bit of weights and state changed outside `masks`, and most weights changed inside."""
    num_moved = num_inside = 0
    for weight, old, mask in zip(model.masker.weights, before, masks, strict=True):
        for name, value in {"weight": weight, **per_element(optimizer, weight)}.items():
            changed = bits(value) != old.get(name, torch.zeros_like(bits(value)))
            assert not (changed & ~mask).any(), f"{name} of a weight outside the mask has changed"
        num_moved += int((bits(weight) != old["weight"])[mask].sum())
        num_inside += int(mask.sum())
    assert num_moved > 0.6 * num_inside  # Some have no gradient, and some updates round to zero.


def unite_masks(model, *routes):
    chosen = [model.mask_bank[route] for route in routes]
    return [torch.stack(masks).any(0) for masks in zip(*chosen, strict=True)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_step_moves_the_ticket_and_nothing_else(name, clip):
    model = small_model()
    unused = [~mask for mask in unite_masks(model, 0, 1, 2)]
    with torch.no_grad():
        for weight, mask in zip(model.masker.weights, unused, strict=True):
            # Values that any arithmetic would change, in no ticket.
            odd = torch.tensor([-0.0, float("inf"), float("nan"), -1e-42])
            weight[mask] = odd.repeat(int(mask.sum()) // 4 + 1)[: int(mask.sum())]
            weight[model.mask_bank[0][0][0, 0, 0, 0] & mask] = -0.0
    optimizer = OPTIMIZERS[name](model)
    dense = [p for p in model.parameters() if not any(p is weight for weight in model.masker.weights)]
    for step in range(9):
        route = step % 3
        before, dense_before = snapshot(model, optimizer), [parameter.detach().clone() for parameter in dense]
        optimizer.zero_grad()
        backward(model, route, seed=step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, route))
        if clip is None:
            assert all(not torch.equal(p, old) for p, old in zip(dense, dense_before, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_negative_zeros_of_other_tickets_keep_their_sign(name):
    model = small_model()
    outside = [~mask for mask in unite_masks(model, 0)]
    with torch.no_grad():
        for weight, mask in zip(model.masker.weights, outside, strict=True):
            weight[mask] = -0.0
    optimizer = OPTIMIZERS[name](model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, 0, seed=step)
        optimizer.step()
    for weight, mask in zip(model.masker.weights, outside, strict=True):
        assert torch.signbit(weight[mask]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulated_gradients_of_one_route(name):
    """Two backwards before a step are one step on the summed loss."""
    results = []
    for accumulated in (True, False):
        model = small_model()
        optimizer = OPTIMIZERS[name](model)
        for step in range(4):
            before = snapshot(model, optimizer)
            optimizer.zero_grad()
            if accumulated:
                backward(model, step % 2, seed=2 * step)
                backward(model, step % 2, seed=2 * step + 1)
            else:
                with model.route_context(step % 2):
                    first = model(**batch(2 * step)).loss
                    (first + model(**batch(2 * step + 1)).loss).backward()
            optimizer.step()
            assert_moved_only_inside(model, optimizer, before, unite_masks(model, step % 2))
        results.append([weight.detach().clone() for weight in model.masker.weights])
    for one, other in zip(*results, strict=True):
        # Adam's first steps are lr · sign: where a gradient is rounding noise its sign is not determined.
        assert ((one - other).abs() > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_two_routes_moves_their_union(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    for routes in ((0, 1), (1, 2), (0, 2), (0, 1, 2)):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        for route in routes:
            backward(model, route, seed=route)
        optimizer.step()
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, *routes))


@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay", "AdamW-fused", "RMSprop"])
def test_under_bfloat16_autocast(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    for step in range(6):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backward(model, step % 3, seed=step)
        optimizer.step()
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, step % 3))


@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay", "AdamW-fused", "RMSprop"])
@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_a_step_that_the_scaler_skips_changes_nothing_and_is_forgotten(name, forget):
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step, overflows in enumerate([True, False, True, False, False]):
        route = step % 3
        before = snapshot(model, optimizer)
        everything = [parameter.detach().clone() for parameter in model.parameters()]
        backward(model, route, seed=step, scale=scaler.scale)
        if overflows:
            model.backbone.classifier.bias.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        {"optimizer": optimizer, "model": model}[forget].zero_grad()
        if overflows:
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), everything, strict=True))
            for old, new in zip(before, snapshot(model, optimizer), strict=True):
                for state, value in new.items():
                    assert torch.equal(value, old.get(state, torch.zeros_like(value)))
        else:
            # Only the new route may move, not that of the skipped step.
            assert_moved_only_inside(model, optimizer, before, unite_masks(model, route))


@pytest.mark.parametrize(
    ("masked", "plain", "arguments"),
    [
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.6, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_one_full_ticket_is_torch(masked, plain, arguments):
    """A step agrees to units in the last place; 20 steps are as close to the exact ones as torch's."""
    model, reference, exact = (small_model(1, density=1) for _ in range(3))
    exact.double()
    ours = masked(model.parameters(), model, **arguments)
    others = [plain(each.parameters(), **arguments, fused=True) for each in (reference, exact)]
    prunable = {id(weight) for weight in model.masker.weights}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        before = [parameter.detach().clone() for parameter in reference.parameters()]
        with model.route_context(0):
            model.routes_since_update.add(0)
            for own, *rest in zip(model.parameters(), reference.parameters(), exact.parameters(), strict=True):
                own.grad = torch.randn(own.shape, generator=generator)
                for other in rest:
                    other.grad = own.grad.to(other.dtype, copy=True)
        for optimizer in (ours, *others):
            optimizer.step()
        errors, torch_errors = [], []
        rows = zip(model.parameters(), reference.parameters(), exact.parameters(), before, strict=True)
        for own, other, truth, old in rows:
            difference = (own - other).detach().abs()
            if id(own) not in prunable:
                assert not difference.any()
                continue
            assert (difference <= 1e-6 * (1 + other.abs())).all()
            if step == 0:
                # Units of the larger of weight and movement, since a sum that cancels has few digits.
                unit = torch.from_numpy(np.spacing(torch.maximum(old.abs(), (other - old).detach().abs()).numpy()))
                assert (difference <= 4 * unit).all()
            errors.append((own - truth).detach().abs().max())
            torch_errors.append((other - truth).detach().abs().max())
        assert max(errors) <= 1.5 * max(torch_errors)


def test_adam_counts_the_updates_of_every_element():
    """Against a loop over elements in float64, each with its own count."""
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.99, 1e-8, 0.1
    model = small_model(hidden_size=4, intermediate_size=6).double()
    optimizer = MaskedAdamW(model.parameters(), model, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    elements = [
        [{"w": float(w), "m": 0.0, "v": 0.0, "t": 0} for w in weight.detach().flatten()]
        for weight in model.masker.weights
    ]
    for step in range(24):
        route = (0, 0, 1, 0, 1, 0, 0, 2)[step % 8]
        optimizer.zero_grad()
        with model.route_context(route):
            pixels = batch(step)["pixel_values"].double()
            model(pixel_values=pixels, labels=batch(step)["labels"]).loss.backward()
        gradients = [weight.grad.flatten().tolist() for weight in model.masker.weights]
        for layer, mask in zip(range(len(elements)), model.mask_bank[route], strict=True):
            for element, g, kept in zip(elements[layer], gradients[layer], mask.flatten().tolist(), strict=True):
                if not kept:
                    continue
                element["t"] += 1
                element["m"] = beta1 * element["m"] + (1 - beta1) * g
                element["v"] = beta2 * element["v"] + (1 - beta2) * g * g
                m_hat = element["m"] / (1 - beta1 ** element["t"])
                v_hat = element["v"] / (1 - beta2 ** element["t"])
                element["w"] -= lr * (decay * element["w"] + m_hat / (math.sqrt(v_hat) + eps))
        optimizer.step()
    counts = {element["t"] for layer in elements for element in layer}
    assert {0, 3, 6, 15, 24} <= counts  # from elements in no ticket to those in all
    for weight, layer in zip(model.masker.weights, elements, strict=True):
        expected = torch.tensor([element["w"] for element in layer], dtype=torch.float64).view(weight.shape)
        assert torch.allclose(weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_first_update_of_an_element_is_a_whole_step_however_late():
    model = small_model(intermediate_size=64)
    optimizer = MaskedAdamW(model.parameters(), model, lr=0.01, eps=1e-12)
    for step in range(50):
        optimizer.zero_grad()
        backward(model, step % 2, seed=step)
        optimizer.step()
    before = [weight.detach().clone() for weight in model.masker.weights]
    optimizer.zero_grad()
    backward(model, 2, seed=50)
    gradients = [weight.grad.clone() for weight in model.masker.weights]
    optimizer.step()
    checked = 0
    for index, (weight, old, gradient) in enumerate(zip(model.masker.weights, before, gradients, strict=True)):
        own = model.mask_bank.exclusive(2)[index] & (gradient.abs() > 1e-6)
        assert torch.allclose((weight - old)[own], -0.01 * gradient[own].sign(), atol=1e-6, rtol=1e-4)
        checked += int(own.sum())
    assert checked > 50


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_and_those_without_gradient_stay(name):
    model = small_model()
    frozen = [model.masker.weights[1], model.backbone.vit.layernorm.weight]
    for parameter in frozen:
        parameter.requires_grad = False
    optimizer = OPTIMIZERS[name](model)
    without = [model.masker.weights[2], model.backbone.classifier.weight]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, 0, seed=0)
    for parameter in without:
        parameter.grad = None
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        still = any(parameter is other for other in frozen + without)
        assert torch.equal(parameter, old) == still


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_needs_a_trained_route(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    for weight in model.masker.weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="no gradient has flowed through a route"):
        optimizer.step()
    for forget in (optimizer, model):
        backward(model, 0, seed=0)
        forget.zero_grad(set_to_none=False)
        with pytest.raises(RuntimeError, match="no gradient has flowed through a route"):
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_forward_alone_lets_no_weight_move(name):
    """A forward of another route between backward and step, without `no_grad`, does not widen the step's mask."""
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    before = snapshot(model, optimizer)
    backward(model, 0, seed=0)
    with model.route_context(1):
        model(**batch(seed=1))
    optimizer.step()
    assert_moved_only_inside(model, optimizer, before, unite_masks(model, 0))


def test_the_route_of_a_step_is_forgotten_after_it():
    for name in OPTIMIZERS:
        model = small_model()
        optimizer = OPTIMIZERS[name](model)
        for step in range(2):  # without zero_grad in between
            before = snapshot(model, optimizer)
            backward(model, step, seed=step)
            optimizer.step()
            changed = [bits(w) != old["weight"] for w, old in zip(model.masker.weights, before, strict=True)]
            outside = zip(changed, unite_masks(model, step), strict=True)
            assert not any((moved & ~mask).any() for moved, mask in outside)


def test_closures_are_called_with_gradients_on():
    for optimizer_class in (MaskedSGD, MaskedAdamW):
        model = small_model()
        optimizer = optimizer_class(model.parameters(), model)
        before = snapshot(model, optimizer)

        def closure(model=model):
            with model.route_context(1):
                loss = model(**batch(0)).loss
                loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, 1))


@pytest.mark.parametrize("chunk", [1, 7, 50, 2**62])
@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay"])
def test_large_weights_are_updated_in_pieces(monkeypatch, name, chunk):
    results = []
    for elements in (chunk, 2**18):
        monkeypatch.setattr(optim, "CHUNK_SIZE", elements)
        model = small_model()
        optimizer = OPTIMIZERS[name](model)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step % 3, seed=step)
            optimizer.step()
        results.append(snapshot(model, optimizer))
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_weight_beyond_the_real_chunk_size():
    model = small_model(hidden_size=512, intermediate_size=520)
    assert max(weight.numel() for weight in model.masker.weights) > optim.CHUNK_SIZE
    optimizer = MaskedAdamW(model.parameters(), model, lr=0.01, weight_decay=0.1)
    for step in range(2):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        backward(model, step, seed=step)
        optimizer.step()
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, step))


@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay", "AdamW-fused"])
def test_the_memory_layout_of_weights_does_not_matter(monkeypatch, name):
    monkeypatch.setattr(optim, "CHUNK_SIZE", 40)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small_model(num_channels=3).to(memory_format=memory_format)
        optimizer = OPTIMIZERS[name](model)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            with model.route_context(step % 3):
                model.routes_since_update.add(step % 3)
                for weight, mask in zip(model.masker.weights, model.mask_bank[step % 3], strict=True):
                    # Gradients have the weight's layout, as autograd's do.
                    weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator) * mask)
            optimizer.step()
        results.append([weight.detach().contiguous() for weight in model.masker.weights])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["MaskedSGD-all", "MaskedAdamW-decay", "AdamW-fused"])
def test_weights_of_several_types(name):
    """As in a T5 in bfloat16, one kind of layer stays in float32."""
    model = small_model()
    for weight in model.masker.weights[::2]:
        weight.data = weight.data.bfloat16()
    alone = small_model()
    optimizer, reference = OPTIMIZERS[name](model), OPTIMIZERS[name](alone)
    for step in range(3):
        before = snapshot(model, optimizer)
        for each in (model, alone):
            generator = torch.Generator().manual_seed(step)
            with each.route_context(step):
                each.routes_since_update.add(step)
                for weight, mask in zip(each.masker.weights, each.mask_bank[step], strict=True):
                    weight.grad = (torch.randn(weight.shape, generator=generator) * mask).to(weight.dtype)
        optimizer.step()
        reference.step()
        assert_moved_only_inside(model, optimizer, before, unite_masks(model, step))
    for weight, other in zip(model.masker.weights, alone.masker.weights, strict=True):
        assert torch.allclose(weight.float(), other, atol=0.03 if weight.dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_continues_exactly(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model)

    def train(model, optimizer, steps):
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.zero_grad()
            backward(model, step % 3, seed=step)
            optimizer.step()

    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_model()
    continued = OPTIMIZERS[name](other)
    other.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(5, 9))
    train(other, continued, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for one, two in zip(snapshot(model, optimizer), snapshot(other, continued), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_counts_of_steps_are_loaded_onto_the_device_of_their_parameter():
    """torch moves counts only for groups marked as fused, but its fused update needs them on the device."""
    model = small_model()
    optimizer = MaskedAdamW(model.parameters(), model)
    backward(model, 0, seed=0)
    optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].double()  # stands for another device
    optimizer.load_state_dict(saved)
    assert {state["step"].dtype for state in optimizer.state.values() if "step" in state} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_an_accelerator(name):
    model = small_model().cuda()
    optimizer = OPTIMIZERS[name](model)
    for step in range(6):
        if step == 3:  # as Trainer resumes
            saved = torch.load(_saved(optimizer.state_dict()), map_location="cpu", weights_only=True)
            optimizer = OPTIMIZERS[name](model)
            optimizer.load_state_dict(saved)
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        with model.route_context(step % 3):
            model(**{key: value.cuda() for key, value in batch(step).items()}).loss.backward()
        optimizer.step()
        assert_moved_only_inside(model, optimizer, before, [mask.cuda() for mask in unite_masks(model, step % 3)])


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
