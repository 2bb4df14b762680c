"""
Changes to files. A case is plain JSON, so that a finding can be repeated from its text:

    {"kind": "config", "folder": 0, "mutations": [["set", 0, 17, 1099511627776], ["flip", 3, 250, 6]]}

A mutation has a name, the number of a document among those of its folder, the place in it and perhaps a value; numbers
beyond the end begin anew. Documents are the files, the headers of tensor files, and both parts of a `README.md` that
programs read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_rtl.modeling.files import METADATA_KEY, write_tensors


NUM_FOLDERS = 3  # most folders of a kind
PLANTED = "planted_module"  # lies in every folder, and nothing may import it
EXTREMES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 10**5, 10**9, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63)),
    *(0.5, -1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "0", "x", "é", "\u202e\u0000", "\ud800", "*", "[", "{0}", "../outside", "/dev/zero", "/etc/hostname", "."),
    *(f"{PLANTED}.Planted", f"../{PLANTED}", f"outside/folder--{PLANTED}.Planted", "https://example.org/x"),
    *([], {}, [[]], [0], [-1, 2**40], [2**40], [10**5, 10**5], ["x", "x"], {"": None}, {"x": {"x": []}}, [None, {}]),
    *("F64", "I8", "BOOL", "F8_E4M3", "float16", "int8", "raw", "deflate", "units-raw", "units-deflate", "labels"),
]
DTYPES = ("float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool", "complex64")
FRAGMENTS = [
    *("---\n", "- \n", ": \n", "\t", "\ufeff", "\u2028", "\r", "\0", "{", "[", "#", "? [a]\n: b\n", "2001-01-01: a\n"),
    *("a: &a [*a]\n", "a: &a {b: *a}\n", "<<: 3\n", "<<: {tags: 5}\n", "tags: 5\n", "tags: {a: b}\n", "5: 6\n"),
    "bomb:\n- &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"- &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
    ),
    f"x: !!python/object/apply:os.system ['import {PLANTED}']\n",
    f"x: !!python/name:{PLANTED}.Planted\n",
    *(
        "model-index: 5\n",
        "model-index:\n- 3\n",
        "model-index:\n- name: x\n",
        "model-index:\n- results: [{dataset: 5}]\n",
    ),
    *("<!-- hf_rtl: begin {} -->\n", "<!-- hf_rtl: end -->", '<!-- hf_rtl: begin {"metadata": 5} -->\n'),
    *("<!-- hf_rtl: begin {x} -->\n", '<!-- hf_rtl: begin {"metadata": {"tags": 5}, "pushed": []} -->\n'),
]


def cases(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Cases of a kind of files: one change, or a few."""
    folders = st.integers(0, NUM_FOLDERS - 1)
    return st.builds(
        lambda folder, mutations: {"kind": kind, "folder": folder, "mutations": mutations},
        folders,
        st.lists(_mutations(), min_size=1, max_size=3),
    )


def _mutations() -> st.SearchStrategy[list[Any]]:
    at, document = st.integers(0, 9999), st.integers(0, 99)
    value = st.one_of(
        st.sampled_from(EXTREMES), st.integers(-3, 40), st.floats(), st.text(max_size=6), st.sampled_from(EXTREMES)
    )
    name = st.one_of(st.sampled_from([x for x in EXTREMES if isinstance(x, str)]), st.text(max_size=6))

    def mutation(kind: str, *parts: st.SearchStrategy) -> st.SearchStrategy[list[Any]]:
        return st.tuples(st.just(kind), document, at, *parts).map(list)

    size = st.sampled_from([1, 2, 3, 8, 100, 10**4, 10**6])
    return st.one_of(
        mutation("set", value),
        mutation("set", value),
        mutation("remove"),
        mutation("rename", name),
        mutation("add", name, value),
        mutation("copy", at),
        mutation("nest", st.sampled_from([2, 50, 400, 10**5])),
        mutation("repeat", st.sampled_from([0, 2, 3, 17, 10**4])),
        mutation("flip", st.integers(0, 7)),
        mutation("cut", size),
        mutation("insert", st.sampled_from(FRAGMENTS) | st.text(max_size=4)),
        mutation("tensor", st.sampled_from(sorted(TENSOR_CHANGES)), at),
    )


# Documents


def documents(folder: Path, pattern: str) -> list[tuple[Path, str]]:
    """The files of a folder, except those in `outside/`, each with the part of it that is a document."""
    found: list[tuple[Path, str]] = []
    files = [file for file in folder.rglob(pattern) if file.is_file() and file.suffix in PARTS]
    for file in sorted(file for file in files if "outside" not in file.relative_to(folder).parts):
        found += [(file, part) for part in PARTS[file.suffix]]
    return found


def _read_header(content: bytes) -> Any:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _write_header(content: bytes, text: str) -> bytes:
    header = text.encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]


_FRONT = re.compile(rb"(?s)^---\n(.*?\n)---\n")
_RECORD = re.compile(rb"<!-- hf_rtl: begin (\{.*\}) -->")


def _replaced(pattern: re.Pattern[bytes], content: bytes, text: str) -> bytes:
    found = pattern.search(content)
    if found is None:
        return content
    return content[: found.start(1)] + text.encode(errors="surrogatepass") + content[found.end(1) :]


# Suffix of a file -> its parts: how each is read as JSON values, and written from their text.
PARTS: dict[str, dict[str, tuple[Callable[[bytes], Any], Callable[[bytes, str], bytes]]]] = {
    ".json": {"all": (json.loads, lambda content, text: text.encode(errors="surrogatepass"))},
    ".safetensors": {"header": (_read_header, _write_header)},
    ".md": {
        # JSON is YAML.
        "front": (
            lambda content: json.loads(json.dumps(yaml.safe_load(_FRONT.search(content)[1]), default=str)),
            lambda content, text: _replaced(_FRONT, content, text + "\n"),
        ),
        "record": (
            lambda content: json.loads(_RECORD.search(content)[1]),
            lambda content, text: _replaced(_RECORD, content, text),
        ),
    },
}


# Applying


def apply(folder: Path, mutations: list[list[Any]], pattern: str) -> list[str]:
    """Changes files of a folder, those whose names match `pattern`. Returns what was done, in words."""
    done = []
    for name, document, at, *values in mutations:
        found = documents(folder, pattern)
        file, part = found[document % len(found)]
        # An earlier mutation may have left nothing to change in this way.
        with contextlib.suppress(Exception):
            if name == "tensor":
                files = [file for file, part in found if part == "header"]
                where = _change_tensors(files[document % len(files)], at, *values)
            elif name in ("flip", "cut", "insert"):
                where = _change_bytes(file, name, at, *values)
            else:
                where = _change_values(file, part, name, at, *values)
            done.append(f"{file.relative_to(folder)} ({part}): {name} {where} {json.dumps(values)[:200]}")
    return done


def _change_bytes(file: Path, name: str, at: int, value: Any) -> str:
    content = bytearray(file.read_bytes())
    # The beginning of a tensor file has more in it than all its numbers.
    position = at % max(1, min(len(content), 3000)) if at % 2 else at * len(content) // 10_000
    if name == "flip":
        content[position] ^= 1 << value
    elif name == "cut":
        del content[position : position + value]
    else:
        content[position:position] = value.encode(errors="surrogatepass")
    file.write_bytes(content)
    return f"at byte {position}"


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in `value`, nested to any depth."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*path, key))


def _get(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _change_values(file: Path, part: str, name: str, at: int, *values: Any) -> str:
    read, write = PARTS[file.suffix][part]
    content = file.read_bytes()
    document = [read(content)]  # in a list, so that every value has a parent
    places = list(_places(document))[1:]
    path = places[at % len(places)]
    parent, key, mark = _get(document, path[:-1]), path[-1], "the place of nested lists"
    nested = "null"
    if name == "set":
        parent[key] = values[0]
    elif name == "remove":
        del parent[key]
    elif name == "rename":
        parent[values[0] if isinstance(parent, dict) else 0] = parent.pop(key)
    elif name == "add":
        inner = parent[key] if isinstance(parent[key], (dict, list)) else parent
        if isinstance(inner, dict):
            inner[values[0]] = values[1]
        else:
            inner.insert(at % (len(inner) + 1), values[1])
    elif name == "copy":
        parent[key] = copy.deepcopy(_get(document, places[values[0] % len(places)]))
    elif name == "repeat":
        parent[key] = [parent[key]] * min(values[0], 10**6 // len(json.dumps(parent[key])))
    else:
        parent[key], nested = mark, "[" * values[0] + "]" * values[0]
    text = json.dumps(document[0]) if document else ""
    file.write_bytes(write(content, text.replace(json.dumps(mark), nested)))
    return ".".join(map(str, path[1:])) or "all"


# Tensor files that say of themselves that they are whole


def _dtype(tensor: torch.Tensor, at: int) -> torch.Tensor:
    return tensor.to(getattr(torch, DTYPES[at % len(DTYPES)]))


def _bits(tensor: torch.Tensor, at: int) -> torch.Tensor:
    flat = tensor.clone().view(-1).view(torch.uint8)
    flat[at % len(flat)] ^= 1 << at % 8
    return flat.view(tensor.dtype).view(tensor.shape)


def _reshaped(tensor: torch.Tensor, at: int) -> torch.Tensor:
    return (tensor.reshape(-1), tensor[None], tensor[..., None], tensor.reshape(-1)[:1], tensor[:0])[at % 5].clone()


def _filled(tensor: torch.Tensor, at: int) -> torch.Tensor:
    values = (0, 1, 255, -1, float("nan"), float("inf"))
    return torch.full_like(tensor, values[at % (6 if tensor.is_floating_point() else 3)])


TENSOR_CHANGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "dtype": _dtype,
    "bits": _bits,
    "reshape": _reshaped,
    "fill": _filled,
    "longer": lambda tensor, at: torch.cat([tensor, tensor[: 1 + at % 9]]),
    "shorter": lambda tensor, at: tensor[: -1 - at % 9].clone(),
    "drop": lambda tensor, at: tensor,
    "rename": lambda tensor, at: tensor,
}


def _change_tensors(file: Path, at: int, how: str, value: int) -> str:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    tensors = load_file(file)
    names = sorted(tensors)
    name = names[at % len(names)]
    tensor = tensors.pop(name)
    if how == "rename":
        tensors[(f"{name}x", names[value % len(names)], name[:-1], "")[value % 4]] = tensor
    elif how != "drop":
        tensors[name] = TENSOR_CHANGES[how](tensor, value)
    if METADATA_KEY in metadata:
        described = json.loads(metadata[METADATA_KEY])
        del described["sha256"]
        write_tensors(file, tensors, **described)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata=metadata)
    return f"{how} {name}"
