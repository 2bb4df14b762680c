"""What all tests have: a seed, a ready picture, and small models made from configurations."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    ViTConfig,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_rtl
from tests.pictures import put_picture


transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trainings_collect_no_garbage() -> Iterator[None]:
    """accelerate collects garbage before every training, and would visit all that is imported."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _cards_have_a_ready_picture() -> Iterator[None]:
    """`tests/model_card/test_written_cards.py` has a card with a picture of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_rtl.plots.similarity_heatmap", put_picture)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_vit_config() -> ViTConfig:
    """A vision transformer for images of 8 x 8; 3 labels; no dropout."""
    return ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


@pytest.fixture
def tiny_bert_config() -> BertConfig:
    """40 tokens, at most 12 of them; 3 labels; no dropout."""
    return BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


@pytest.fixture
def tiny_gpt2_config() -> GPT2Config:
    """40 tokens, at most 12 of them; no dropout."""
    return GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )


@pytest.fixture
def tiny_t5_config() -> T5Config:
    """40 tokens; the input embeddings of encoder, decoder and the output head are one tensor; no dropout."""
    return T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )


class TinyAttentionConfig(PreTrainedConfig):
    model_type = "tiny_attention_for_tests"
    hidden_size: int = 8
    num_tokens: int = 20


class TinyAttentionLayer(GradientCheckpointingLayer):
    """`nn.MultiheadAttention` reads its weights itself, without calling the modules that hold them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.dense = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dense(torch.tanh(self.attention(x, x, x, need_weights=False)[0]))


class TinyAttentionForSequenceClassification(PreTrainedModel):
    config_class = TinyAttentionConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: TinyAttentionConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.num_tokens, config.hidden_size)
        self.layers = nn.ModuleList([TinyAttentionLayer(config.hidden_size) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            initialization.normal_(parameter, std=0.3)

    def forward(self, input_ids, labels=None, return_dict=True):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(TinyAttentionConfig.model_type, TinyAttentionConfig)
AutoModelForSequenceClassification.register(TinyAttentionConfig, TinyAttentionForSequenceClassification)


@pytest.fixture
def tiny_attention_config() -> TinyAttentionConfig:
    """The model above around `nn.MultiheadAttention`, known to `AutoModelForSequenceClassification`; 3 labels."""
    return TinyAttentionConfig(num_labels=3)


def _fill_masks(model: hf_rtl.RTLModel, keep: float = 0.5, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = model.mask_bank.shapes
    masks = [[torch.rand(s, generator=generator) < keep for s in shapes] for _ in range(model.num_routes)]
    for route, mask in enumerate(masks):
        model.mask_bank[route] = mask
    return masks


@pytest.fixture
def fill_masks():
    """`fill_masks(model, keep=0.5, seed=0)` gives a model random masks and returns them: route -> `bool` tensors."""
    return _fill_masks


@pytest.fixture
def tiny_membership_model() -> hf_rtl.RTLModelForImageClassification:
    """A timm network with batch norm, 3 membership routes with random masks, for images of 32 x 32."""
    model = hf_rtl.RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["cat", "dog", "owl"], ticket_task="membership", seed=0
    )
    _fill_masks(model)
    return model


@pytest.fixture
def tiny_labels_model() -> hf_rtl.RTLModelForImageClassification:
    """A timm network with batch norm, 3 routes with random masks that predict 4 labels, for images of 32 x 32."""
    model = hf_rtl.RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["day", "dusk", "night"], ticket_task="labels", num_labels=4, seed=0
    )
    _fill_masks(model)
    return model
