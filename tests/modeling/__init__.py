"""Tests of `hf_rtl.modeling`: the routed model against plain copies of its backbone, and its files."""
