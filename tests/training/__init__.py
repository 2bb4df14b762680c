"""
Tests of `hf_rtl.training`: the parts by themselves, and whole small runs (`small_runs.py`).

Several processes are in `tests/distributed`.
"""
