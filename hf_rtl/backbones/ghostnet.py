"""The paper's cut GhostNet, as the timm model `ghostnet_rtl`."""

from typing import Any

from timm.layers import Linear
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.ghostnet import GhostNet
from torch import nn


__all__ = ["GhostNetRTL"]

# One list per stage, one row per bottleneck: kernel, expansion's width, output channels, squeeze-excitation ratio,
# stride. These are the first nine bottlenecks of timm's `ghostnet_100`, under the same names.
_STAGES: list[list[list[int | float]]] = [
    [[3, 16, 16, 0, 1]],
    [[3, 48, 24, 0, 2]],
    [[3, 72, 24, 0, 1]],
    [[5, 72, 40, 0.25, 2]],
    [[5, 120, 40, 0.25, 1]],
    [[3, 240, 80, 0, 2]],
    [[3, 200, 80, 0, 1], [3, 184, 80, 0, 1], [3, 184, 80, 0, 1]],
]
_HEAD_WIDTH = 128


class GhostNetRTL(GhostNet):
    """GhostNet cut after its ninth bottleneck: stride 16, a 1x1 convolution to 184 channels, a 128-wide head.

    Weights start as torch initialises them, like every GhostNet of timm: convolutions from a Kaiming uniform
    distribution over the fan-in, with `a=sqrt(5)`. The choice decides which layers a global magnitude ranking of
    the initial weights empties at 75 % sparsity: here wide 1x1 convolutions; depthwise ones with a Kaiming normal
    distribution over the fan-out, for which torch ignores groups.

    Args:
        num_classes (`int`, defaults to 10):
            Width of the classifier; 0 leaves it out, and the model returns the features `[B, 128]`.
        in_chans (`int`, defaults to 3):
            Channels of the images.
        drop_rate (`float`, defaults to 0.0):
            Dropout before the classifier. timm's other GhostNets default to 0.2.
        kwargs:
            Passed to [`timm.models.ghostnet.GhostNet`].
    """

    # Squeeze-excitation stays dense. fnmatch patterns over parameter names, the default of `prune_exclude`.
    rtl_prune_exclude: tuple[str, ...] = ("*.se.*",)

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(_STAGES, num_classes=0, in_chans=in_chans, drop_rate=drop_rate, **kwargs)
        stem = self.conv_stem.weight
        factory = {"device": stem.device, "dtype": stem.dtype}
        self.num_classes = num_classes
        self.head_hidden_size = _HEAD_WIDTH
        self.conv_head = nn.Conv2d(self.num_features, _HEAD_WIDTH, 1, **factory)
        if num_classes > 0:
            self.classifier = Linear(_HEAD_WIDTH, num_classes, **factory)


default_cfgs = generate_default_cfgs(
    {
        "ghostnet_rtl.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (2, 2),
            "crop_pct": 1.0,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2601.22141",
        }
    }
)


@register_model
def ghostnet_rtl(pretrained: bool = False, **kwargs: Any) -> GhostNetRTL:
    """The backbone of Routing the Lottery's vision experiments. There are no pretrained weights."""
    return build_model_with_cfg(
        GhostNetRTL,
        "ghostnet_rtl",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )
