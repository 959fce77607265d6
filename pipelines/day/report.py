"""The day for people: one Markdown file with a table for each kind of item."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffattn.benchmarks.variants import FLOOR
from diffattn.machine import where
from diffattn.tables import markdown_table

from . import alone, middle, steps, thresholds

Record = Mapping[str, Any]
Rows = list[tuple[str, ...]]

REHEARSAL = "**A rehearsal with tiny sizes: these times mean nothing.**"


def markdown(conditions: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Every finished item in the table of its kind, then what could not be measured and why.

    Args:
        conditions: machine, dtype and whether it was a rehearsal.
        records: of the items that were begun.
    """
    machine = conditions["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["# A day with a GPU", "", *([REHEARSAL, ""] if conditions["tiny"] else [])]
    lines += [f"{where(machine)}, {conditions['dtype']}, {versions}, commit {machine['commit']}."]
    for kind, (title, head, rows_of, note) in SECTIONS.items():
        found = [record["result"] for record in records if record["kind"] == kind and "result" in record]
        rows = [row for result in found if len(result) > 1 for row in rows_of(result)]
        if rows:
            lines += ["", f"## {title}", "", note, "", markdown_table(head, rows)]
    missing = [record for record in records if "error" in record]
    if missing:
        rows = [(r["title"], r["status"], r["error"].splitlines()[0]) for r in missing]
        lines += ["", "## Not measured", "", markdown_table(("item", "status", "error"), rows)]
    return "\n".join(lines) + "\n"


def _attention(result: Record) -> Rows:
    place = (f"{result['tokens']:,}", f"{result['heads']} × {result['head_dim']}")
    return [(*place, *_timed(name, variant)) for name, variant in result["variants"].items()] + [
        (*place, name, why, "") for name, why in result["left_out"].items()
    ]


def _step(result: Record) -> Rows:
    place = (result["title"], str(result["size"]), str(result["batch"]), result["mode"])
    return [
        (*place, *_timed(name, variant), _share(variant), _mib(variant)) for name, variant in result["variants"].items()
    ]


def _thresholds(result: Record) -> Rows:
    return [(str(number), f"{tokens:,}") for number, tokens in result["thresholds"].items()]


def _middle(result: Record) -> Rows:
    place = (f"{result['tokens']:,}", str(result["landmarks"]))
    return [
        (*place, name, f"{part['number']} {part['what']}", f"{part['seconds'] * 1e6:.0f}")
        for name, part in result["parts"].items()
    ]


def _timed(name: str, variant: Record) -> tuple[str, ...]:
    """Name, milliseconds with their middle half, ratio with its middle half."""
    seconds, ratio = variant["seconds"], variant["time_ratio"]
    return (name, _spread(seconds, 1e3, ".3f"), _spread(ratio, 1, ".3f"))


def _spread(found: Record, factor: float, form: str) -> str:
    low, high = (x * factor for x in found["iqr"])
    return f"{found['median'] * factor:{form}} ({low:{form}}–{high:{form}})"


def _share(variant: Record) -> str:
    share = variant.get("share_of_floor_saving")
    return "" if share is None else f"{share:.0%}"


def _mib(variant: Record) -> str:
    peak = variant.get("peak_mib")
    return "" if peak is None else f"{peak:.0f}"


SECTIONS: Mapping[str, tuple[str, tuple[str, ...], Callable[[Record], Rows], str]] = {
    alone.KIND: (
        "Attention alone",
        ("tokens", "heads", "variant", "milliseconds (middle half)", "time / fastest exact"),
        _attention,
        f"One call on random q, k, v, batch {alone.BATCH}. Ratios are to the exact backend with the smallest median.",
    ),
    steps.KIND: (
        "Whole steps",
        ("model", "px", "batch", "mode", "variant", "milliseconds (middle half)", "time / exact", "of floor's saving",
         "peak MiB"),
        _step,
        "Random weights. Landmarks calibrate in every one of these steps; in a sampling run they do so in every 8th. "
        f"`{FLOOR}`: the attention call returns v.",
    ),
    thresholds.KIND: (
        "Thresholds",
        ("landmarks", "faster from (tokens)"),
        _thresholds,
        f"To use them: `DIFFATTN_THRESHOLDS={thresholds.FILE}`, or `diffattn bench thresholds` on the same machine.",
    ),
    middle.KIND: (
        "The middle step of landmarks",
        ("tokens", "landmarks", "part", "launched", "microseconds on the device"),
        _middle,
        "Read off torch's profiler. The middle steps are the differences to the two attentions.",
    ),
}  # fmt: skip
"""Kind of item -> title, head, rows, and what to know."""
