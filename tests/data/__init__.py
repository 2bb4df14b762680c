"""
Tests of `hf_rtl.data`: which route every sample has, and the batches made of that.

`columns` is tested with `partition_by`, which reads columns by it. What `route_data` gives is seen in whole runs, in
`tests/training/test_trainer_partitions.py`.
"""
