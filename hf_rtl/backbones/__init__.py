"""Backbones that the paper needs and the libraries lack. Importing this package registers them."""

from .ghostnet import GhostNetRTL


__all__ = ["GhostNetRTL"]
