"""Tests of `recipes/`: functions by themselves, and the commands in processes of their own (`commands.py`)."""
