"""Backbones that the paper needs and the libraries lack. Importing this package registers them."""

from .ghostnet import GhostNetRTL
from .speech_unet import SpeechUNet, SpeechUNetConfig


__all__ = ["GhostNetRTL", "SpeechUNet", "SpeechUNetConfig"]
