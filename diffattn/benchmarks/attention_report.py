"""The benchmark's results as a table and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffattn.benchmarks.plots import Entries, draw_ratios, save_panels, style_of_number, variants_in
from diffattn.benchmarks.variants import FLOOR, SDPA, VARIANTS
from diffattn.measure.tables import TIMING_HEAD, conditions, rounds_of, timing_cells
from diffattn.tables import text_table

HEAD = ("variant", *TIMING_HEAD, "of floor's saving", "layers", "exact heads", "peak / exact", "peak MiB")


def table(results: Mapping[str, Any]) -> str:
    """All results as text tables, with the machine they were measured on."""
    return "\n\n".join([conditions(results), *(_section(entry) for entry in results["results"])])


def _section(entry: Mapping[str, Any]) -> str:
    title = f"{title_of(entry)}, {entry['mode']}, {rounds_of(entry)}; {tokens_text(entry)}{ceiling_text(entry)}"
    rows = [_row(name, variant) for name, variant in entry["variants"].items()]
    left_out = [f"{name} left out: {why}" for name, why in entry["left_out"].items()]
    return "\n".join([title, text_table(HEAD, rows), *left_out])


def title_of(entry: Mapping[str, Any]) -> str:
    """The model of an entry, with its depth where that is known, and the size."""
    depth = f" ({entry['depth']})" if entry.get("depth") else ""
    return f"{entry['title']}{depth}, {entry.get('pixels', entry['size'])} px"


def tokens_text(entry: Mapping[str, Any]) -> str:
    """The tokens of self-attention, by level where there are several."""
    tokens = [f"{entry['tokens'][str(level)]} tokens" for level in entry["levels"]]
    if entry["levels"] == [0]:
        return tokens[0]
    return "levels " + ", ".join(f"{level} ({n})" for level, n in zip(entry["levels"], tokens, strict=True))


def ceiling_text(entry: Mapping[str, Any]) -> str:
    """The share of attention in a step, and how much faster a step could be without any; empty if unknown."""
    if entry.get("ceiling") is None:
        return ""
    return f"; attention takes {entry['attention_share']:.0%} of a step: at most {entry['ceiling']:.2f} times as fast"


def _row(name: str, variant: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        *timing_cells(variant),
        cell(variant, "share_of_floor_saving", ".0%"),
        str(variant["layers"]),
        cell(variant, "exact_head_share", ".1%"),
        cell(variant, "peak_ratio", ".2f"),
        cell(variant, "peak_mib", ".0f"),
    )


def cell(variant: Mapping[str, Any], key: str, form: str) -> str:
    """A figure of a variant as text, empty where it has none."""
    return "" if variant.get(key) is None else f"{variant[key]:{form}}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time ratio to exact attention over the size, one panel per model and mode; bars are interquartile ranges.

    Raises:
        ValueError: matplotlib is not installed, or there is no result.
    """
    ylabel = "time of one step / time with exact attention"
    save_panels(results, path, lambda e: f"{e['title']}, {e['mode']}", _panel, ylabel)


def style_of(name: str) -> dict[str, Any]:
    """The style of a variant, the same in every plot; one that is not in `VARIANTS` also gets a colour."""
    if name == FLOOR:
        return {"label": "floor (no attention)", "color": "0.55", "linestyle": "--"}
    known = [variant for variant in VARIANTS if variant not in (SDPA, FLOOR)]
    place = known.index(name) if name in known else len(known)
    return {"label": name, **style_of_number(place)}


def _panel(axis: Any, entries: Entries) -> None:
    for name in variants_in(entries):
        if name != SDPA:
            draw_ratios(axis, entries, name, **style_of(name))
    axis.axhline(1, color="black", linewidth=1, label="exact (SDPA)")
    sizes = [entry["size"] for entry in entries]
    is_video = any(entry.get("pixels", "").count("x") > 1 for entry in entries)
    axis.set_xticks(sizes, [f"{size}p" if is_video else f"{size}²" for size in sizes])
    axis.set_xlabel("pixels")
