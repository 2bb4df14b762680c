"""The page of a repository with ticket files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .markdown import text


_PAGE = """\
---
{metadata}
---

# {name}

Tickets of {base}: each is a sparse subnetwork of that model, a mask over its weights with what else the route has of
its own. They are of use only together with a copy of it.

```python
from hf_rtl import RTLModel

model = RTLModel.from_pretrained({base_name!r})
model.load_tickets({repo_id!r})  # or routes=[…], some of them
```

| route | kept weights | density | weights that the base has not |
|---|---|---|---|
{rows}
"""


def tickets_card(repo_id: str, index: Mapping[str, Any]) -> ModelCard:
    """The card of the tickets in `index`, as of `ticket_files.read_index`, in the repository `repo_id`."""
    base = index["base"].get("repo")
    num_weights = sum(math.prod(shape) for _, shape in index["weights"])
    rows = [
        f"| {text(ticket['name'])} | {ticket['kept']:,} | {ticket['kept'] / num_weights:.1%} | {ticket['added']:,} |"
        for ticket in index["tickets"]
    ]
    data = ModelCardData(
        library_name="hf_rtl", tags=["hf_rtl", "tickets", "pruning"], base_model=base, base_model_relation="adapter"
    )
    content = _PAGE.format(
        metadata=data.to_yaml(),
        name=repo_id.split("/")[-1],
        base=f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the Hub",
        base_name=base or "path/of/the/model",
        repo_id=repo_id,
        rows="\n".join(rows),
    )
    return ModelCard(content)
