"""Tests of `hf_rtl.backbones`: the architectures that the libraries lack, by themselves and with tickets."""
