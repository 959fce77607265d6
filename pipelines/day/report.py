"""The report of the day: one Markdown file with a table for each kind of item."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffattn.benchmarks.attention_report import cell, title_of
from diffattn.benchmarks.variants import FLOOR, SDPA
from diffattn.machine import where
from diffattn.tables import markdown_table

from . import alone, middle, steps, thresholds

Record = Mapping[str, Any]
Rows = list[tuple[str, ...]]

REHEARSAL = "**A rehearsal with tiny sizes: these times mean nothing.**"
TIMES = ("variant", "milliseconds (middle half)")


def markdown(conditions: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Every finished item in the tables of its kind, then what could not be measured and why.

    Args:
        conditions: machine, dtype and whether it was a rehearsal.
        records: of the items that were begun.
    """
    machine = conditions["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["# A day with a GPU", "", *([REHEARSAL, ""] if conditions["tiny"] else [])]
    lines += [f"{where(machine)}, {conditions['dtype']}, {versions}, commit {machine['commit']}."]
    for section in SECTIONS:
        found = [record["result"] for record in records if record["kind"] == section.kind and "result" in record]
        rows = [row for result in found if set(result) > {"complete"} for row in section.rows(result)]
        if rows:
            lines += ["", f"## {section.title}", "", section.note, "", markdown_table(section.head, rows)]
    missing = [record for record in records if "error" in record]
    if missing:
        rows = [(r["title"], r["status"], r["error"].splitlines()[0]) for r in missing]
        lines += ["", "## Not measured", "", markdown_table(("item", "status", "error"), rows)]
    return "\n".join(lines) + "\n"


def _attention(result: Record) -> Rows:
    place = (f"{result['tokens']:,}", f"{result['heads']} × {result['head_dim']}")
    return _timed(result, *place)


def _step(result: Record) -> Rows:
    place = (title_of(result), str(result["batch"]), result["mode"])
    rows = _timed(result, *place)
    more = [
        (
            cell(variant, "share_of_floor_saving", ".0%"),
            cell(result, "attention_share", ".0%") if name == SDPA else "",
            cell(result, "ceiling", ".2f") if name == SDPA else "",
            cell(variant, "peak_ratio", ".2f"),
            cell(variant, "peak_mib", ".0f"),
        )
        for name, variant in result["variants"].items()
    ]
    more += [("",) * 5] * len(result["left_out"])
    return [(*row, *cells) for row, cells in zip(rows, more, strict=True)]


def _thresholds(result: Record) -> Rows:
    """Every number of landmarks that was measured, also those that were faster nowhere."""
    faster, last = result["thresholds"], {}
    for tokens, ratios in sorted(result["time_ratios"].items(), key=lambda pair: int(pair[0])):
        last |= {name: (int(tokens), ratio) for name, ratio in ratios.items()}
    return [
        (name, f"{faster[name]:,}" if name in faster else f"not up to {tokens:,}", f"{ratio:.2f} at {tokens:,}")
        for name, (tokens, ratio) in last.items()
    ]


def _launched(result: Record) -> Rows:
    place = (f"{result['tokens']:,}", str(result["landmarks"]))
    return [
        (*place, name, f"{part['number']} {part['what']}", f"{part['seconds'] * 1e6:.0f}")
        for name, part in result["parts"].items()
    ]


def _calls(result: Record) -> Rows:
    return _timed(result, f"{result['tokens']:,}", str(result["landmarks"]))


def _timed(result: Record, *place: str) -> Rows:
    """Every variant after the cells `place`: its name, milliseconds and ratio with their middle halves; then what was
    left out, with the reason in place of the time."""
    rows = [
        (*place, name, _spread(variant["seconds"], 1e3), _spread(variant["time_ratio"]))
        for name, variant in result["variants"].items()
    ]
    return rows + [(*place, name, why, "") for name, why in result["left_out"].items()]


def _spread(found: Record, factor: float = 1) -> str:
    low, high = (x * factor for x in found["iqr"])
    return f"{found['median'] * factor:.3f} ({low:.3f}–{high:.3f})"


class Section(NamedTuple):
    """A table of the report."""

    kind: str  # of the items in it
    title: str
    head: tuple[str, ...]
    rows: Callable[[Record], Rows]  # of one item's result
    note: str


SECTIONS = (
    Section(
        alone.KIND,
        "Attention alone",
        ("tokens", "heads", *TIMES, "time / fastest exact"),
        _attention,
        f"One call on smooth q, k, v, batch {alone.BATCH}. Ratios are to the exact backend with the smallest median.",
    ),
    Section(
        steps.KIND,
        "Whole steps",
        ("model", "batch", "mode", *TIMES, "time / exact", "of floor's saving", "attention's share", "ceiling",
         "peak / exact", "peak MiB"),
        _step,
        "Random weights. Landmarks calibrate in every one of these steps; in a sampling run that is not compiled, in "
        f"every 8th. `{FLOOR}`: the attention call returns the values; nothing that replaces it can save more.",
    ),
    Section(
        thresholds.KIND,
        "Thresholds",
        ("landmarks", "faster from (tokens)", "time / exact"),
        _thresholds,
        f"To use them: `DIFFATTN_THRESHOLDS={thresholds.FILE}`, or `diffattn bench thresholds` on the same machine.",
    ),
    Section(
        middle.KIND,
        "The middle step of landmarks",
        ("tokens", "landmarks", "part", "launched", "microseconds on the device"),
        _launched,
        "Read off torch's profiler. The middle steps are the differences to the two attentions.",
    ),
    Section(
        middle.KIND,
        "Calls of landmarks, compiled",
        ("tokens", "landmarks", *TIMES, "time / exact"),
        _calls,
        "The same calls without sampling, timed: where launches take longer than the work, compiling shows it.",
    ),
)  # fmt: skip
