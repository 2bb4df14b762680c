"""
The tests mirror the package: `tests/ROOM/test_MODULE.py` and `tests/ROOM/test_MODULE_BEHAVIOUR.py` test
`hf_rtl/ROOM/MODULE.py`. Modules outside the rooms, and the documentation, have their tests in this folder.

Helpers lie beside the tests that use them, and are imported by their full name, such as `tests.training.small_runs`.
So every folder is a package, and the root of the checkout is the only folder in which Python looks for tests and for
`hf_rtl`, in this process and in child processes.
"""
