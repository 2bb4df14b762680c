"""Small networks with units, of all kinds that tests remove units from."""

import json
from contextlib import ExitStack
from unittest import mock

import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from hf_rtl.modeling.build_backbone import build_backbone
from hf_rtl.modeling.units import find_units


TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTTLENECKS = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "num_classes": 3}

# Name -> source, Auto class, options of the source.
BACKBONES = {
    "bert": (BertConfig(**TEXT), AutoModelForSequenceClassification, {}),
    "roberta": (RobertaConfig(**TEXT), AutoModelForMaskedLM, {}),
    "albert": (AlbertConfig(**TEXT, embedding_size=8), AutoModelForMaskedLM, {}),
    "gpt2": (GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, eos_token_id=2), AutoModelForCausalLM, {}),
    "llama": (LlamaConfig(**TEXT, num_key_value_heads=2), AutoModelForCausalLM, {}),
    "phi3": (Phi3Config(**TEXT, num_key_value_heads=2), AutoModelForCausalLM, {}),
    "t5": (
        T5Config(
            vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        AutoModelForSeq2SeqLM,
        {},
    ),
    "bart": (
        BartConfig(
            vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=20, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        ),
        AutoModelForSeq2SeqLM,
        {},
    ),
    "vit": (
        ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=16,
        ),
        AutoModelForImageClassification,
        {},
    ),
    "timm vit": ("test_vit", AutoModelForImageClassification, {"depth": 2, "embed_dim": 32, "num_classes": 3}),
    "bottlenecks": ("resnet50", AutoModelForImageClassification, BOTTLENECKS),
    "basic blocks": ("resnet18", AutoModelForImageClassification, BOTTLENECKS),
    "convnext": (
        "test_convnext", AutoModelForImageClassification, {"depths": [1, 2, 1, 1], "num_classes": 3},
    ),
    "depthwise": ("test_efficientnet", AutoModelForImageClassification, {"num_classes": 3}),
}  # fmt: skip


def build(name):
    """A network whose biases and norms are random too, in evaluation mode, and the inputs of a forward."""
    source, auto_class, options = BACKBONES[name]
    network = build_backbone(source, auto_class, pretrained=None, seed=0, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif network.main_input_name == "input_ids":
                parameter.mul_(0.2 / parameter.std())  # so that neurons do something
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    if network.main_input_name == "pixel_values":
        return network, {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    inputs = {"input_ids": torch.randint(3, 40, (2, 6), generator=generator)}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 40, (2, 5), generator=generator)
    return network, inputs


def zero_units(network, layer, removed):
    """Makes all matrices of the units `removed` zero."""
    matrices = {name: parameter for name, parameter in network.named_parameters() if parameter.ndim > 1}
    with torch.no_grad():
        for (name, dim), units in layer.places.items():
            if name in matrices:
                matrices[name].index_fill_(dim, units[removed].flatten(), 0)


# Fields of configurations that change no graph.
_NAMES = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "label_names", "transformers_version"}
_found = {}


def find_units_once(network, example_inputs=None):
    """As `find_units`, but once for all tests: tracing takes seconds. Neither weights nor sizes of inputs matter."""
    config = {name: value for name, value in network.config.to_dict().items() if name not in _NAMES}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    inputs = sorted(network.dummy_inputs if example_inputs is None else example_inputs)
    key = (type(network), json.dumps(config, default=str, sort_keys=True), str(shapes), str(inputs))
    if key not in _found:
        _found[key] = find_units(network, example_inputs)
    return _found[key]


def units_found_once(*modules):
    """A context in which modules find units with `find_units_once`."""
    stack = ExitStack()
    for module in modules:
        stack.enter_context(mock.patch.object(module, "find_units", find_units_once))
    return stack
