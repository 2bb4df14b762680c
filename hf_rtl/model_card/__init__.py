"""
The card of a model, or of ticket files: a generated part of `README.md`. All other text of the file stays.

This folder imports `modeling`, `data` and `plots.py`, but not `training`: it reads the record that a run writes beside
its model.
"""

from .card import RTLCardData, write_card, write_pushed_card
from .ticket_page import tickets_page


__all__ = ["RTLCardData", "tickets_page", "write_card", "write_pushed_card"]
