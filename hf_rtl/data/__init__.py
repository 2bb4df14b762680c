"""
Data: the route of every sample, and the batches made by route.

It imports `modeling`. What a training does with the batches does not belong here.
"""
