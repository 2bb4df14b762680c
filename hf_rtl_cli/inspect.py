"""`hf-rtl inspect`: describes a saved model."""

from __future__ import annotations

import argparse
import sys
import textwrap
from statistics import fmean
from typing import Any

from hf_rtl import RTLModel, load_rule
from hf_rtl.modeling.footprint import FOOTPRINT_FORMS, human_bytes

from .models import load_model
from .similarity import pairs_text, similarity_values
from .tables import bar, fraction, key_values, listing, more, printable, table, wrapped


_MAX_ROUTES = 20
_MAX_WEIGHTS = 30


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.model, revision=args.revision, token=args.token)
    bank, config, backbone = model.mask_bank, model.config, model.backbone
    shown = bank.route_names if args.route is None else [bank.route_names[bank.route_index(args.route)]]
    return {
        "model": args.model,
        "class": type(model).__name__,
        "backbone": type(backbone).__name__,
        "architecture": getattr(backbone.config, "architecture", backbone.config.model_type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "ticket_task": config.ticket_task,
        "router": config.router,
        "norm_statistics": config.norm_statistics,
        "calibrated": config.thresholds is not None,
        "rule": _rule(args),
        "hf_rtl_version": config.hf_rtl_version,
        "format_version": config.format_version,
        "base": config.base,
        "num_prunable": bank.num_weights,
        "union": bank.union_count(),
        "core": bank.core_count(),
        "routes": _routes(model),
        "weights": _weights(model, shown),
        "similarity": similarity_values(bank),
        "footprint": model.footprint(),
    }


def _rule(args: argparse.Namespace) -> str | None:
    """The description of the rule beside the model; `None` if there is none, or it does not fit the model."""
    try:
        return load_rule(args.model, revision=args.revision, token=args.token).describe()
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"The rule beside the model is left out: {error}", file=sys.stderr)
        return None


def _routes(model: RTLModel) -> list[dict[str, Any]]:
    kept, densities = model.mask_bank.count().tolist(), model.mask_bank.density().tolist()
    thresholds = model.config.thresholds or [None] * model.num_routes
    rows = zip(model.route_names, kept, densities, thresholds, strict=True)
    return [
        {"name": name, "kept": count, "density": density, "threshold": threshold}
        for name, count, density, threshold in rows
    ]


def _weights(model: RTLModel, shown: list[str]) -> list[dict[str, Any]]:
    bank = model.mask_bank
    rows = zip(bank.weight_names, bank.shapes, bank.count(per_layer=True).tolist(), strict=True)
    return [
        {
            "name": name,
            "shape": list(shape),
            "size": shape.numel(),
            "kept": {route: count for route, count in zip(bank.route_names, counts, strict=True) if route in shown},
        }
        for name, shape, counts in rows
    ]


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    parts = [
        _description_text(values),
        _routes_text(values, None if args.all else _MAX_ROUTES),
        _weights_text(values["weights"], None if args.all else _MAX_WEIGHTS),
        pairs_text(values["similarity"], [route["name"] for route in values["routes"]], show_all=args.all),
        _footprint_text(values["footprint"], len(values["routes"])),
    ]
    return "\n\n".join(parts)


def _description_text(values: dict[str, Any]) -> str:
    lines = {
        "class": values["class"],
        "backbone": f"{values['backbone']}, {printable(values['architecture'])}",
        "tickets": f"{len(values['routes'])}, for {values['ticket_task']}",
        "router": values["router"],
        "statistics": values["norm_statistics"],
        "calibrated": "yes" if values["calibrated"] else "no",
        **({} if values["rule"] is None else {"routes": f"of new data: {printable(values['rule'])}"}),
        "saved": f"as {values['dtype']} by hf_rtl {printable(values['hf_rtl_version'])}, "
        f"format {values['format_version']}",
    }
    if "repo" in (values["base"] or {}):
        lines["base"] = f"{printable(values['base']['repo'])}, revision {printable(values['base']['revision'])}"
    return f"{printable(values['model'])}\n{textwrap.indent(key_values(lines), '  ')}"


def _routes_text(values: dict[str, Any], limit: int | None) -> str:
    routes, rows = values["routes"], []
    for route in routes[:limit]:
        cells = [f"{route['kept']:,}", fraction(route["density"])]
        if values["calibrated"]:
            cells.append(f"{route['threshold']:+.3f}")
        rows.append([printable(route["name"]), *cells, bar(route["density"], route["density"], 16)])
    headers = ["route", "kept", "density", *(["threshold"] if values["calibrated"] else []), ""]
    size, union, core = values["num_prunable"], values["union"], values["core"]
    summary = (
        f"{union:,} of {size:,} prunable weights are in at least one ticket (union, {fraction(union / size)}), "
        f"{core:,} in every ticket (core, {fraction(core / size)})."
    )
    lines = [table(headers, rows), *more(len(routes) - len(rows)), "", wrapped(summary)]
    return "\n".join(lines)


def _weights_text(weights: list[dict[str, Any]], limit: int | None) -> str:
    routes = list(weights[0]["kept"])
    one = len(routes) == 1
    rows = []
    for weight in weights[:limit]:
        densities = [count / weight["size"] for count in weight["kept"].values()]
        low, mean, high = min(densities), fmean(densities), max(densities)
        cells = map(fraction, [mean] if one else [low, mean, high])
        empty = densities.count(0)
        note = "" if not empty else "  empty" if one else f"  empty in {empty}"
        rows.append([printable(weight["name"]), f"{weight['size']:,}", *cells, bar(low, high, 12) + note])
    if one:
        title = f"Density of the ticket {printable(routes[0])!r} in each weight"
        headers = ["weight", "size", "density", ""]
    else:
        title = f"Density of {len(routes)} tickets in each weight; bars: full to the minimum, half full to the maximum"
        headers = ["weight", "size", "min", "mean", "max", ""]
    hidden = weights[len(rows) :]
    num_empty = sum(0 in weight["kept"].values() for weight in hidden)
    note = f" ({num_empty} empty in at least one ticket)" if num_empty else ""
    return listing(title, headers, rows, len(hidden), note=note)


def _footprint_text(footprint: dict[str, int], num_routes: int) -> str:
    plain, sparse = footprint["independent_full_bytes"], footprint["independent_compact_bytes"]
    rows = []
    for key, form in FOOTPRINT_FORMS.items():
        size = footprint[key]
        ratios = [f"{size / plain:.3f}", f"{size / sparse:.3f}"]
        rows.append([form.format(num_routes), human_bytes(size), f"{size:,}", *ratios])
    headers = ["footprint", "size", "bytes", f"of {num_routes} plain", f"of {num_routes} sparse"]
    return table(headers, rows)
