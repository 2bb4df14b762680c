"""
Training: finding tickets, and retraining them jointly.

This folder may import every other part of the package except its top. What a model computes belongs in `modeling`.
"""
