"""The card of a repository with ticket files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from .markdown import table, text
from .readme import Readme


_PAGE = """\
{title}

Tickets of {base}: each is a sparse subnetwork of that model, a mask over its weights with what else the route has of
its own. They are of use only together with a copy of it.

```python
from hf_rtl import RTLModel

model = RTLModel.from_pretrained({base_name!r})
model.load_tickets({repo_id!r})  # or routes=[…], some of them
```

Where they were found in a stock model, that alone will do, with the class of its task:
`RTLModelForCausalLM.from_backbone(stock_model, tickets={repo_id!r})`.

{tickets}
"""


def tickets_page(index: Mapping[str, Any], content: bytes, *, repo_id: str | None = None) -> bytes | None:
    """
    The content of a `README.md` whose generated part lists the tickets of `index`; all other text stays byte for byte.

    Args:
        index (`Mapping[str, Any]`): the result of `ticket_files.read_index`.
        content (`bytes`): present content of the file; `b""` if there is no file.
        repo_id (`str`, *optional*): the repository that the tickets are pushed to. Without it, only an existing part
            that lists tickets of a repository is updated.

    Returns:
        The new content. `None` if the file must not change: its generated part is that of a model, or, without
        `repo_id`, it has none.

    Raises:
        ValueError: the file is not UTF-8, or its metadata is not YAML.
    """
    readme = Readme.parse(content)
    shown = repo_id if readme.record is None else readme.record.get("repo_id")
    if shown is None:
        return None
    repo_id = repo_id or shown
    base = index["base"].get("repo")
    metadata = ModelCardData(
        library_name="hf_rtl",
        tags=["hf_rtl", "tickets", "pruning"],
        base_model=base,
        base_model_relation="adapter" if base else None,
    ).to_dict()
    part = _PAGE.format(
        title="" if readme.has_title else f"# {repo_id.split('/')[-1]}",
        base=f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the Hub",
        base_name=base or "path/of/the/model",
        repo_id=repo_id,
        tickets=_table(index),
    )
    return readme.with_generated(part, readme.merged(metadata), {"repo_id": repo_id, "metadata": metadata})


def _table(index: Mapping[str, Any]) -> str:
    num_weights = sum(math.prod(shape) for _, shape in index["weights"])
    rows = [
        [text(ticket["name"]), f"{ticket['kept']:,}", f"{ticket['kept'] / num_weights:.1%}", f"{ticket['added']:,}"]
        for ticket in index["tickets"]
    ]
    return table(["route", "kept weights", "density", "weights that the base has not"], rows)
