"""Runs on several processes: what they find, what is left when they are killed, and how they are started."""
