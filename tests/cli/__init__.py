"""Tests of `hf_rtl_cli`: the `hf-rtl` command, in this process, on small saved models."""
