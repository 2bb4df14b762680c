"""Tests of `hf_rtl.model_card`: what the page of a model says, and whose text on it stays."""
