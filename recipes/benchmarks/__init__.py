"""
Benchmarks of the time of a step, of a mixed batch and of several processes, against plain PyTorch or a single process.
Modules import hf_rtl and `shared`. The quality of tickets is not measured here.
"""
