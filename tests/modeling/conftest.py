"""Models of several kinds with random masks."""

import pytest
import torch

from hf_rtl import (
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
)
from tests.modeling.naive import BATCH, padding, some_labels


@pytest.fixture
def zoo(request, fill_masks):
    """`zoo(kind)` returns a model in float64 with three random masks, these masks, and inputs with labels."""

    def build(kind, dtype=torch.float64, **kwargs):
        routes = {"route_names": ["x", "y", "z"], "ticket_task": "labels", "seed": 0, **kwargs}
        ids = torch.randint(2, 20, (BATCH, 7))
        if kind == "resnet":
            model = RTLModelForImageClassification.from_backbone("test_resnet", num_labels=3, **routes)
            inputs = {"pixel_values": torch.randn(BATCH, 3, 32, 32, dtype=dtype), "labels": torch.arange(BATCH) % 3}
        elif kind == "vit":
            config = request.getfixturevalue("tiny_vit_config")
            model = RTLModelForImageClassification.from_backbone(config, **routes)
            inputs = {"pixel_values": torch.randn(BATCH, 3, 8, 8, dtype=dtype), "labels": torch.arange(BATCH) % 3}
        elif kind == "bert":  # the embedding is tied to the head, and pruned
            config = request.getfixturevalue("tiny_bert_config")
            include = ["*word_embeddings.weight"]
            model = RTLModelForMaskedLM.from_backbone(config, prune_include=include, **routes)
            inputs = {"input_ids": ids, "attention_mask": padding(ids), "labels": some_labels(ids)}
        elif kind == "t5":  # one tensor in four places, and pruned
            config = request.getfixturevalue("tiny_t5_config")
            model = RTLModelForSeq2SeqLM.from_backbone(config, prune_include=["shared.weight"], **routes)
            inputs = {"input_ids": ids, "attention_mask": padding(ids), "labels": some_labels(ids)}
            inputs["decoder_input_ids"] = torch.randint(2, 20, (BATCH, 7))
        elif kind == "gpt2":
            model = RTLModelForCausalLM.from_backbone(request.getfixturevalue("tiny_gpt2_config"), **routes)
            inputs = {"input_ids": ids, "attention_mask": padding(ids), "labels": some_labels(ids)}
        else:
            config = request.getfixturevalue("tiny_attention_config")
            model = RTLModelForSequenceClassification.from_backbone(config, **routes)
            inputs = {"input_ids": ids, "labels": torch.arange(BATCH) % 3}
        return model.to(dtype), fill_masks(model), inputs

    return build
