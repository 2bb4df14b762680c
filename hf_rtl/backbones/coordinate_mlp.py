"""The paper's implicit neural representation, as the transformers model `coordinate_mlp` (paper, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput, can_return_tuple


class CoordinateMLPConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CoordinateMLP`]. The defaults are the paper's network: 34→128→128→128→128→3.

    Args:
        num_frequencies (`int`, *optional*, defaults to 8): F, frequencies in the Fourier features of each coordinate.
        hidden_size (`int`, *optional*, defaults to 128): width of the hidden layers.
        num_hidden_layers (`int`, *optional*, defaults to 4): how many there are.
        num_classes (`int`, *optional*, defaults to 0): classes of coordinates, which are an input; 0 for none.
        class_embedding_size (`int`, *optional*, defaults to 16): width of the learned embedding of each.
        num_labels (`int`, *optional*, defaults to 3): values at a coordinate, such as red, green and blue.
    """

    model_type = "coordinate_mlp"

    num_frequencies: int = 8
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_classes: int = 0
    class_embedding_size: int = 16

    problem_type: str | None = "regression"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = 3
        super().__post_init__(**kwargs)


@dataclass
class CoordinateMLPOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): scalar, the mean squared error, if labels were given.
        logits (`Tensor`): `[N, num_labels]`, the values at the coordinates, not clamped.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class CoordinateMLP(PreTrainedModel):
    """
    A ReLU network from Fourier features of a point to the values there, such as colours of an image.

    The paper says that 34 encoded coordinates enter the network, not how. Our reading: the two coordinates, and the
    sine and cosine of each times π, 2π, 4π, …, 128π, which are 2 + 2·2·8. Weights start from a Kaiming uniform
    distribution for ReLU, biases from zero.

    With `num_classes`, a learned embedding of the point's class is appended to the 34 inputs of the first layer. The
    layer's weights for these 16 inputs are a separate matrix, `class_projection`; the sum is the same. This matrix and
    the embedding are drawn last, so the other weights are those of the network without classes under the same seed.
    """

    config_class = CoordinateMLPConfig
    config: CoordinateMLPConfig
    main_input_name = "coordinates"

    def __init__(self, config: CoordinateMLPConfig) -> None:
        super().__init__(config)
        num_inputs = 2 + 4 * config.num_frequencies
        sizes = [num_inputs, *[config.hidden_size] * config.num_hidden_layers, config.num_labels]
        self.layers = nn.ModuleList(
            nn.Linear(size, next_size) for size, next_size in zip(sizes[:-1], sizes[1:], strict=True)
        )
        if config.num_classes:
            # Modules draw when they are made. This must not change the state from which all weights are drawn later.
            with torch.random.fork_rng(devices=[]):
                self.class_embedding = nn.Embedding(config.num_classes, config.class_embedding_size)
                self.class_projection = nn.Linear(config.class_embedding_size, sizes[1], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            initialization.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            # The projection of classes is a part of the first layer, and starts on its scale.
            fan_in = self.layers[0].in_features if module.bias is None else module.in_features
            bound = math.sqrt(6 / fan_in)
            initialization.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                initialization.zeros_(module.bias)

    def features(self, coordinates: Tensor) -> Tensor:
        """`[N, 2]` → `[N, 2 + 4 F]`: x and y; the sines of x and y for each frequency, then likewise the cosines."""
        powers = torch.arange(self.config.num_frequencies, device=coordinates.device)
        frequencies = math.pi * 2.0 ** powers.to(coordinates.dtype)
        angles = (frequencies[:, None] * coordinates[:, None, :]).flatten(1)
        return torch.cat([coordinates, angles.sin(), angles.cos()], dim=1)

    @can_return_tuple
    def forward(
        self, coordinates: Tensor, class_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> CoordinateMLPOutput | tuple:
        """
        Args:
            coordinates (`Tensor`): floats `[N, 2]`, x and y in [-1, 1].
            class_ids (`Tensor`, *optional*): integers `[N]`, needed if and only if `config.num_classes` is set.
            labels (`Tensor`, *optional*): `[N, num_labels]`, the values to learn.

        Raises:
            ValueError: `class_ids` are missing, or the network has no classes.
        """
        if (class_ids is not None) != bool(self.config.num_classes):
            problem = "are missing" if class_ids is None else "were given"
            raise ValueError(f"`class_ids` {problem}, and the network has `num_classes` = {self.config.num_classes}.")
        hidden = self.layers[0](self.features(coordinates))
        if class_ids is not None:
            hidden = hidden + self.class_projection(self.class_embedding(class_ids))
        for layer in self.layers[1:]:
            hidden = layer(hidden.relu())
        loss = None if labels is None else nn.functional.mse_loss(hidden, labels)
        return CoordinateMLPOutput(loss=loss, logits=hidden)


AutoConfig.register(CoordinateMLPConfig.model_type, CoordinateMLPConfig, exist_ok=True)
AutoModel.register(CoordinateMLPConfig, CoordinateMLP, exist_ok=True)
