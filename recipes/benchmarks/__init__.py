"""
Benchmarks of time and memory: each figure of hf_rtl and that of its rival in turn in one process, by two clocks.
`python -m benchmarks` runs all but scaling.py, which compares several processes with one. Modules import hf_rtl and
`shared`. The quality of tickets is not measured here.
"""
