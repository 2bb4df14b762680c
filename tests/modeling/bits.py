"""Comparison of models to the bit."""

import torch


def tensors(model):
    """Every parameter and buffer, including those that are not saved, under all of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_bit_equal(model, other):
    one, two = tensors(model), tensors(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
