"""The mediator benchmark's results: tables, the token counts from which mediators pay off, and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffattn.benchmarks.mediator_subjects import SOFTMAX
from diffattn.benchmarks.plots import Entries, draw_ratios, save_panels, style_of_number, variants_in
from diffattn.measure.tables import TIMING_HEAD, conditions, rounds_of, timing_cells
from diffattn.tables import text_table

HEAD = ("variant", *TIMING_HEAD, "GFLOPs", "peak MiB")
NOTE = "training is forward and backward, without an optimizer; peak MiB is a call's memory beyond weights and inputs"


def table(results: Mapping[str, Any]) -> str:
    """All results as text tables, with the machine, and the token counts from which mediators pay off."""
    left_out = [f"{e['model']}, {e['size']} tokens, {e['mode']}: left out, {e['why']}" for e in results["left_out"]]
    entries = sorted(results["results"], key=lambda e: (e["model"], e["mode"], e["size"]))
    head = f"{conditions(results)}\n{NOTE}"
    return "\n\n".join(filter(None, [head, *map(_section, entries), "\n".join(left_out), _pays(results)]))


def _section(entry: Mapping[str, Any]) -> str:
    title = f"{entry['model']}, {entry['size']} tokens, {entry['mode']}, {rounds_of(entry)}"
    rows = [_row(name, variant) for name, variant in entry["variants"].items()]
    return f"{title}\n{text_table(HEAD, rows)}"


def _row(name: str, variant: Mapping[str, Any]) -> tuple[str, ...]:
    peak = variant["peak_mib"]
    return (
        name if name == SOFTMAX else f"n={name}",
        *timing_cells(variant),
        f"{variant['gflops']:.4g}",
        "" if peak is None else f"{peak:.1f}",
    )


def _pays(results: Mapping[str, Any]) -> str:
    lines = []
    for model, modes in results["pays_from"].items():
        for mode, row in sorted(modes.items()):
            largest = max(e["size"] for e in results["results"] if (e["model"], e["mode"]) == (model, mode))
            found = (f"n={n} {f'not up to {largest}' if at is None else f'from {at}'}" for n, at in row.items())
            lines.append(f"{model}, {mode}: {', '.join(found)}")
    return "\n".join(["numbers of tokens at which mediators are faster:", *lines]) if lines else ""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time ratio to softmax over the tokens, one panel per block or model and mode; bars are interquartile ranges.

    Raises:
        ValueError: matplotlib is not installed, or there is no result.
    """
    ylabel = "time / time with softmax attention"
    save_panels(results, path, lambda e: f"{e['model']}, {e['mode']}", _panel, ylabel)


def _panel(axis: Any, entries: Entries) -> None:
    names = [name for name in variants_in(entries) if name != SOFTMAX]
    for i, name in enumerate(names):
        draw_ratios(axis, entries, name, label=f"n={name}", **style_of_number(i))
    axis.axhline(1, color="black", linewidth=1, label="softmax (SDPA)")
    sizes = [entry["size"] for entry in entries]
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xlabel("tokens")
