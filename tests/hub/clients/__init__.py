"""
The functions that the processes of the Hub's tests run, a module for each theme. The process that forks the others
imports all of them once: see `tests.hub.processes`.
"""
