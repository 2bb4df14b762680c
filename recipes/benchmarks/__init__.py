"""
What a step, a mixed batch and a further process cost, against plain PyTorch or a single process. Modules import hf_rtl
and `shared`; how good tickets are is not measured here.
"""
