"""
Tests of `hf_rtl.data`: which route every sample has, and the batches made of that.

`columns` is tested by tests of `partition_by`, which uses it. `route_data` is tested in whole runs, in
`tests/training/test_trainer_partitions.py`.
"""
