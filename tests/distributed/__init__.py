"""Runs on several processes: their results, what is left after they are killed, and how they are started."""
