"""Tests that push models, tickets and rules to a Hub on this machine and pull them, each in a fresh process."""
