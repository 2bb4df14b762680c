"""Models that are refused before memory is taken for them, and damaged files that transformers reads unchecked."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from hf_rtl import RTLModel, RTLModelForCausalLM, RTLModelForSequenceClassification


@pytest.fixture
def folder(tmp_path):
    """A saved model; its index, `model.safetensors.index.json`, too."""
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = RTLModelForSequenceClassification.from_backbone(
        config, route_names=["x", "y"], ticket_task="labels", num_labels=3, seed=0
    )
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


def change_config(folder, **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in fields.items():
        (config if name in config else config["backbone_config"])[name] = value
    file.write_text(json.dumps(config))


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 10**9}, "wrong sizes of 1 .*word_embeddings"),
        ({"max_position_embeddings": 10**8}, "wrong sizes of 1 .*position_embeddings"),
        ({"num_hidden_layers": 10**9}, "`backbone_config`, of a 'bert', .*modules"),
        ({"hidden_size": 10**9}, "`prunable` does not fit the backbone"),
        ({"router": "centroid", "router_features": 10**11}, "lacks 4 .*router.directions"),
        ({"prunable": [["bert.encoder.layer.0.attention.self.query.weight", [2**40, 2**40]]]}, "`prunable`"),
    ],
)
def test_a_model_that_is_larger_than_its_files_takes_no_memory(folder, compact, fields, message):
    if compact:
        RTLModel.from_pretrained(folder).save_pretrained(folder, compact=True)
    RTLModel.from_pretrained(folder)
    change_config(folder, **fields)
    before = peak()
    with pytest.raises(ValueError, match=message):
        RTLModel.from_pretrained(folder)
    assert peak() - before < 2**26


def test_a_header_that_promises_more_than_the_file_holds_is_refused(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**40]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match="a file of weights of .* is cut short or damaged"):
        RTLModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}, "metadata": {}}', "[" * 10**5]
)
def test_a_damaged_index_of_files_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json of .* is damaged"):
        RTLModel.from_pretrained(folder)


def test_an_index_that_names_a_folder_is_refused(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "")
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="of the checkpoint .* cannot be read"):
        RTLModel.from_pretrained(folder)


def test_damaged_codes_name_the_checkpoint(folder):
    RTLModel.from_pretrained(folder).save_pretrained(folder, compact=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in ("compact.units", "compact.union") if name in tensors)
    save_file({**tensors, name: torch.zeros(3, dtype=torch.uint8)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint {str(folder)!r} is damaged: a coded mask"):
        RTLModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ["null", "[]", "[" * 10**5, "5"])
def test_damaged_settings_of_generation_are_named(tmp_path, tiny_gpt2_config, content):
    model = RTLModelForCausalLM.from_backbone(tiny_gpt2_config, route_names=["x"], ticket_task="labels", seed=0)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="`generation_config.json` of .* is damaged"):
        RTLModel.from_pretrained(tmp_path)
