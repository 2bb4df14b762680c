"""
Training: finding tickets, and retraining them jointly.

It imports everything but the top of the package. What a model computes, whatever the training, does not belong here.
"""
