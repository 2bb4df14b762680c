"""
Backbones that the paper needs and the libraries lack. Importing this package registers them.

They import torch, timm and transformers, but nothing of this package: code that knows routes does not belong here.
"""

from .coordinate_mlp import CoordinateMLP, CoordinateMLPConfig
from .ghostnet import GhostNetRTL
from .speech_unet import SpeechUNet, SpeechUNetConfig


__all__ = ["CoordinateMLP", "CoordinateMLPConfig", "GhostNetRTL", "SpeechUNet", "SpeechUNetConfig"]
