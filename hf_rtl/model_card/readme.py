"""A `README.md` with a generated part between two marks; the rest belongs to whoever wrote it, and stays."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


_BEGIN = re.compile(r"<!-- hf_rtl: begin (\{.*\}) -->\r?\n")
_END = "<!-- hf_rtl: end -->"
_NOTE = (
    "<!-- Made by hf_rtl, anew with every save. Text outside of these two marks stays, and so does metadata that you "
    "have changed. -->"
)
ALL_ROUTES_LABEL = "all routes"
# The configurations of results that are ours.
_OURS = re.compile(rf"(^|, )(route .+|{ALL_ROUTES_LABEL})$", re.DOTALL)
# A few lines of YAML can say more than memory holds, by aliases of aliases.
_MOST_VALUES, _MOST_DEPTH = 100_000, 50
# What YAML raises for text that is none, and for values that are none of their type, such as `!!bool x`.
_YAML_ERRORS = (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError)
# A line of YAML with which a new key of the outermost mapping begins.
_KEY = re.compile(r"^(?=[^\s#\-].*:)", re.MULTILINE)


@dataclass
class Readme:
    """
    A file's text, taken apart.

    Args:
        front (`str`): the YAML between the two lines of dashes, as it is written.
        before (`str`), after (`str`): the text around the generated part; without one, all is before it.
        record (`dict`): what was noted in the generated part when it was made; `None` if there is no such part.
        newline (`str`): how lines end.
    """

    front: str = ""
    before: str = ""
    after: str = ""
    record: dict[str, Any] | None = None
    newline: str = "\n"
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        try:
            metadata = None if _is_deep(self.front) else yaml.safe_load(self.front)
            is_large = _is_deep(self.front) or _num_values(metadata, {}) > _MOST_VALUES
        except RecursionError:
            is_large = True
        except _YAML_ERRORS as error:
            raise ValueError(f"the metadata of README.md, between its lines of dashes, is no YAML: {error}") from None
        if is_large:
            raise ValueError(
                f"the metadata of README.md may have {_MOST_VALUES:,} values, with those that aliases repeat, nested "
                f"{_MOST_DEPTH} deep; it has more."
            )
        if not isinstance(metadata or {}, dict):
            raise ValueError(
                f"the metadata of README.md must be `key: value` lines between two lines of dashes, got {metadata!r}."
            )
        self.metadata = metadata or {}
        try:
            _merged_index(self.metadata.get("model-index") or [], [])
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                "`model-index` in the metadata of README.md must be a list of models with `name` and `results`, each "
                f"result with a `dataset`, got {self.metadata['model-index']!r}."
            ) from None

    @classmethod
    def parse(cls, content: bytes) -> Readme:
        """Takes a file apart. Raises `ValueError` if it is not UTF-8, or its metadata are no YAML mapping."""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"README.md must be text in UTF-8: {error}.") from None
        newline = "\r\n" if "\r\n" in text else "\n"
        front = ""
        if match := REGEX_YAML_BLOCK.search(text):
            front, text = match[2], text[match.end() :]
        end = text.rfind(_END)
        begins = [match for match in _BEGIN.finditer(text) if match.end() <= end]
        if not begins:
            return cls(front, text, newline=newline)
        begin = begins[-1]
        return cls(front, text[: begin.start()], text[end + len(_END) :], _noted(begin[1]), newline)

    def own_part(self) -> str:
        """A hash of what is not ours: the text, and metadata that are other than we wrote them."""
        noted = (self.record or {}).get("metadata", {})
        metadata = {name: value for name, value in self.metadata.items() if value != noted.get(name)}
        metadata["missing"] = sorted(noted.keys() - self.metadata.keys())
        metadata["model-index"] = merge_metadata(self.metadata, {}, {}).get("model-index")
        parts = [self.before.strip(), self.after.strip(), yaml_dump(metadata, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def last_pushed(self) -> str:
        """What `own_part` was when the file was last pushed to the Hub."""
        return (self.record or {}).get("pushed", Readme().own_part())

    @property
    def is_edited(self) -> bool:
        """Whether what is not ours is other than when the file was last pushed to the Hub."""
        return self.own_part() != self.last_pushed

    @property
    def has_title(self) -> bool:
        """Whether there is a heading of the first level in the text around the generated part."""
        return any(line.startswith("# ") for line in (self.before + self.after).splitlines())

    def merged(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata with `ours` in them, but where they were changed by hand since ours were written."""
        return merge_metadata(self.metadata, ours, (self.record or {}).get("metadata", {}))

    def with_generated(self, part: str, metadata: Mapping[str, Any], note: Mapping[str, Any]) -> bytes:
        """
        The file with another generated part and other metadata, whose unchanged keys stay as they are written.

        Args:
            part (`str`): Markdown. Where there was none, it follows the text.
            metadata (`Mapping[str, Any]`): all of it.
            note (`Mapping[str, Any]`): JSON values to find in `record` again.
        """
        before, after = self.before, self.after
        if self.record is None:
            num_breaks = before[len(before.rstrip()) :].count("\n")
            before += self.newline * max(0, (2 if before.strip() else 1) - num_breaks)
            after = self.newline
        # Nothing in the part may be taken for a mark.
        part = part.replace("<!-- hf_rtl:", "<!-- hf-rtl:")
        # In a comment no ">" may follow two dashes.
        record = json.dumps(note).replace("--", "-\\u002d").replace(">", "\\u003e")
        lines = [f"<!-- hf_rtl: begin {record} -->", _NOTE, "", *part.strip().split("\n"), "", _END]
        return "".join(
            (
                f"---{self.newline}{self._changed_front(metadata)}{self.newline}---{self.newline}",
                before,
                self.newline.join(lines),
                after,
            )
        ).encode()

    def _changed_front(self, metadata: Mapping[str, Any]) -> str:
        lines = []
        new = dict(metadata)
        for chunk in _KEY.split(self.front):
            keys = list(_parsed(chunk))
            if len(keys) != 1 or new.get(keys[0]) == self.metadata.get(keys[0]):
                lines.append(chunk.rstrip("\r\n"))
            else:
                lines += [_dumped(keys[0], new[keys[0]])] if keys[0] in new else []
                lines += [line.rstrip("\r") for line in chunk.split("\n") if line.lstrip().startswith("#")]
            for key in keys:
                new.pop(key, None)
        lines += [_dumped(key, value) for key, value in new.items()]
        front = "\n".join(line for line in lines if line).replace("\r\n", "\n")
        if _parsed(front) != metadata:  # written in a way that cannot be taken apart by lines
            front = "\n".join(_dumped(key, value) for key, value in metadata.items())
        return front.replace("\n", self.newline)


def merge_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """
    Metadata for a file whose keys may have been changed since ours were written: what is changed stays. Results in
    `model-index` are ours by their configuration, and replaced.

    Args:
        theirs (`Mapping[str, Any]`): what the file says.
        ours (`Mapping[str, Any]`): what it is to say.
        before (`Mapping[str, Any]`): what we last wrote into it; empty if we never did.

    Returns:
        `dict[str, Any]`: the keys of the file in their order, then new ones. In lists, what is new in ours is added.
    """
    merged: dict[str, Any] = {}
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        their, our, old = theirs.get(key), ours.get(key), before.get(key)
        if key == "model-index":
            merged[key] = _merged_index(their or [], our or [])
        elif their == old:
            merged[key] = our
        elif isinstance(our, list):
            listed = their if isinstance(their, list) else [their] if their is not None else []
            before_ours = old if isinstance(old, list) else []
            added = [entry for entry in our if entry not in [*listed, *before_ours]]
            merged[key] = [*listed, *added] if added else their
        else:
            merged[key] = their
    return {key: value for key, value in merged.items() if value is not None and value != []}


def _merged_index(theirs: list[dict], ours: list[dict]) -> list[dict]:
    """The results of the first model of the file that are not ours, then ours, and its other models."""
    first = theirs[0] if theirs else {"results": []}
    results = [result for result in first["results"] if not _OURS.search(str(result["dataset"].get("config", "")))]
    results += ours[0]["results"] if ours else []
    name = first.get("name") or (ours[0]["name"] if ours else None)
    return ([{"name": name, "results": results}] if results else []) + theirs[1:]


def _is_deep(front: str) -> bool:
    """Whether brackets are nested so deeply that YAML takes long to refuse them; those in texts count, too."""
    changes = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", front))
    return max(accumulate(changes), default=0) > 4 * _MOST_DEPTH


def _num_values(value: Any, known: dict[int, float], depth: int = 0) -> float:
    """The number of values in `value`; infinite if it has itself within, or is nested too deeply."""
    if depth > _MOST_DEPTH:
        return math.inf
    if isinstance(value, (dict, list)) and id(value) not in known:
        known[id(value)] = math.inf  # until all in it are counted
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(item, known, depth + 1) for item in inner)
    return known.get(id(value), 1)


def _dumped(key: str, value: Any) -> str:
    return yaml_dump({key: value}, sort_keys=False).rstrip("\n")


def _parsed(front: str) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(front)
    except (RecursionError, *_YAML_ERRORS):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _noted(record: str) -> dict[str, Any]:
    try:
        noted = json.loads(record)
    except (RecursionError, ValueError):
        return {}  # somebody has typed there
    kinds = {"metadata": dict, "given": dict, "pushed": str, "repo_id": str}
    return noted if all(isinstance(noted.get(name, kind()), kind) for name, kind in kinds.items()) else {}
