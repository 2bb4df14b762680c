"""`hf-rtl tickets`: finds, lists, adds, drops and saves single tickets."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Literal

from transformers.utils import has_file

from hf_rtl import RTLModel
from hf_rtl.data.rules import follow_routes
from hf_rtl.modeling.hub import CARD_FILE
from hf_rtl.modeling.ticket_files import INDEX_FILE, read_index

from .find import find
from .models import check_free, check_name, copy_beside, load_model, saved_form, written_model
from .tables import fraction, more, printable, table


_MAX_TICKETS = 40


def run(args: argparse.Namespace) -> dict[str, Any]:
    return {"find": find, "list": _list, "add": _add, "drop": _drop, "save": _save}[args.action](args)


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    if args.action == "list":
        return _list_text(values, None if args.all else _MAX_TICKETS)
    names = ", ".join(map(printable, values["tickets"]))
    done = {"find": "Found", "add": "Added", "drop": "Dropped", "save": "Saved"}[args.action]
    routes = f"; the model there has {len(values['routes'])} routes" if "routes" in values else ""
    return f"{done} {names}, in {values['folder']}{routes}."


# list


def _list(args: argparse.Namespace) -> dict[str, Any]:
    check_name(args.source, revision=args.revision)
    hub = {"revision": args.revision, "token": args.token}
    if has_file(args.source, INDEX_FILE, **hub):
        index = read_index(args.source, **hub)
        kind, base, ticket_task = "tickets", index["base"], index["ticket_task"]
        num_prunable = sum(math.prod(shape) for _, shape in index["weights"])
        rows = [(ticket["name"], ticket["kept"], ticket["added"], ticket["threshold"]) for ticket in index["tickets"]]
    else:
        model = load_model(args.source, **hub)
        kind, base, ticket_task = "model", model.config.base, model.config.ticket_task
        num_prunable = model.mask_bank.num_weights
        thresholds = model.config.thresholds or [None] * model.num_routes
        kept_by_route = zip(model.route_names, model.mask_bank.count().tolist(), thresholds, strict=True)
        rows = [(name, kept, None, threshold) for name, kept, threshold in kept_by_route]
    return {
        "source": args.source,
        "kind": kind,
        "base": base,
        "ticket_task": ticket_task,
        "num_prunable": num_prunable,
        "tickets": [
            {"name": name, "kept": kept, "density": kept / num_prunable, "added": added, "threshold": threshold}
            for name, kept, added, threshold in rows
        ],
    }


def _list_text(values: dict[str, Any], limit: int | None) -> str:
    rows = []
    for ticket in values["tickets"][:limit]:
        cells = [printable(ticket["name"]), f"{ticket['kept']:,}", fraction(ticket["density"])]
        rows.append(cells if ticket["added"] is None else [*cells, f"{ticket['added']:,}"])
    headers = ["ticket", "kept", "density", *(["not in the base"] if values["kind"] == "tickets" else [])]
    lines = [_origin(values), "", table(headers, rows)]
    return "\n".join([*lines, *more(len(values["tickets"]) - len(rows))])


def _origin(values: dict[str, Any]) -> str:
    base = values["base"] or {}
    repo = f" of {printable(base['repo'])} at {printable(base['revision'])[:12]}" if base.get("repo") else ""
    count = len(values["tickets"])
    what = "Ticket files" if values["kind"] == "tickets" else "A model with tickets"
    return f"{what}{repo}: {count}, for {values['ticket_task']}"


# Changing a model


def _add(args: argparse.Namespace) -> dict[str, Any]:
    folder = _target(args)
    check_name(args.tickets, revision=args.tickets_revision)
    model = load_model(args.model, revision=args.revision, token=args.token)
    added = model.load_tickets(
        args.tickets,
        routes=args.route,
        rename=_parse_renames(args.rename),
        revision=args.tickets_revision,
        token=args.token,
    )
    return _write(model, folder, args, added)


def _drop(args: argparse.Namespace) -> dict[str, Any]:
    folder = _target(args)
    model = load_model(args.model, revision=args.revision, token=args.token)
    for route in args.route:
        model.drop_route(route)
    return _write(model, folder, args, args.route)


def _target(args: argparse.Namespace) -> Path:
    """The folder to write a changed model into, by default its own."""
    if args.out is not None:
        check_free(Path(args.out), force=False)
        return Path(args.out)
    check_name(args.model, revision=args.revision)
    if not Path(args.model).is_dir():
        raise ValueError(f"{args.model!r} is a repo, which is not changed: add --out DIR, a folder for the new model.")
    return Path(args.model)


def _write(model: RTLModel, folder: Path, args: argparse.Namespace, changed: list[str]) -> dict[str, Any]:
    form = saved_form(args.model, revision=args.revision, token=args.token)
    if args.out is None:
        model.save_pretrained(folder, **form)
        follow_routes(folder, model.route_names, shown=folder)
    else:
        with written_model(folder) as staging:
            copy_beside(args.model, staging, revision=args.revision, token=args.token)
            model.save_pretrained(staging, **form)
            follow_routes(staging, model.route_names, shown=folder)
    if (folder / CARD_FILE).is_file():
        print(f"README.md still describes the earlier model; `hf-rtl card {folder}` updates it.", file=sys.stderr)
    return {"folder": str(folder), "tickets": changed, "routes": model.route_names}


def _parse_renames(pairs: list[str] | None) -> dict[str, str] | Literal["auto"] | None:
    if pairs is None or pairs == ["auto"]:
        return "auto" if pairs else None
    split = [pair.partition("=") for pair in pairs]
    wrong = [pair for pair, (_, _, new) in zip(pairs, split, strict=True) if not new]
    if wrong:
        raise ValueError(
            f"--rename {wrong[0]} must be OLD=NEW, the name in the ticket files and the new name in the model."
        )
    return {old: new for old, _, new in split}


def _save(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.out)
    check_free(folder, force=args.force)
    model = load_model(args.model, revision=args.revision, token=args.token)
    index = model.save_tickets(folder, routes=args.route)
    return {"folder": str(folder), "tickets": [ticket["name"] for ticket in index["tickets"]]}
