"""Tests of `hf_rtl.model_card`: what the card of a model says, and which text of users it keeps."""
