"""
What the processes of the Hub's tests do, a module for each theme. All are imported once, by the process that the
others are forked from: see `tests.hub.processes`.
"""
