"""Files from strangers: changed at random, they are refused by an error that says why, or read; see `__main__.py`."""
