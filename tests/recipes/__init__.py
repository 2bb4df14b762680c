"""Tests of `recipes/`: single functions, and the commands in child processes (`commands.py`)."""
