"""
Data: which route every sample has, and the batches made of that.

It imports `modeling`. What a training does with the batches does not belong here.
"""
