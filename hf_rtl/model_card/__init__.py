"""
The page of a model, or of its tickets: a part that is generated, in a `README.md` whose other text stays.

It imports `modeling`, `data` and the plots of the hall. What happens in a training does not belong here: of that it
reads the record that a run leaves beside its model.
"""

from .card import RTLCardData, write_card, write_pushed_card
from .ticket_page import tickets_page


__all__ = ["RTLCardData", "tickets_page", "write_card", "write_pushed_card"]
