"""Plots of time ratios: one panel per group of results, error bars for the middle half of the rounds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattn.measure.tables import conditions

COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#E69F00", "#F0E442")
"""Distinguishable by the colour-blind too (Okabe and Ito)."""

MARKERS = ("o", "s", "^", "v", "D", "x")

Entries = Sequence[Mapping[str, Any]]


def save_panels(
    results: Mapping[str, Any],
    path: Path,
    group: Callable[[Mapping[str, Any]], str],
    panel: Callable[[Any, Entries], None],
    ylabel: str,
) -> None:
    """One panel for each group of the results, side by side, by size from left to right.

    Args:
        results: the content of a benchmark's result file.
        path: of the picture; its folder is created.
        group: the title of the panel that an entry belongs to.
        panel: draws the entries of one group, sorted by size, on its axes.
        ylabel: of the first panel; all panels share the scale.

    Raises:
        ValueError: matplotlib is not installed, or there is no result.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'diffattn[eval]'") from None
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sorted(results["results"], key=lambda e: e["size"]):
        groups.setdefault(group(entry), []).append(entry)
    if not groups:
        raise ValueError("there is no result to plot")
    figure = Figure(figsize=(len(groups) * (5 if len(groups) < 3 else 4), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, (title, entries) in zip(axes, sorted(groups.items()), strict=True):
        panel(axis, entries)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(ylabel)
    figure.suptitle(conditions(results), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_ratios(axis: Any, entries: Entries, name: str, **style: Any) -> None:
    """The time ratio of one variant over the size, where it was measured; bars are interquartile ranges."""
    found = [(e["size"], e["variants"][name]["time_ratio"]) for e in entries if name in e["variants"]]
    middle = [ratio["median"] for _, ratio in found]
    below = [m - ratio["iqr"][0] for m, (_, ratio) in zip(middle, found, strict=True)]
    above = [ratio["iqr"][1] - m for m, (_, ratio) in zip(middle, found, strict=True)]
    axis.errorbar([size for size, _ in found], middle, yerr=[below, above], capsize=3, **style)


def style_of_number(i: int) -> dict[str, str]:
    """Colour and marker of the i-th variant: cycles through the colours, then again with another marker."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}


def variants_in(entries: Entries) -> list[str]:
    """The names of all variants without duplicates, in order of first appearance."""
    return list(dict.fromkeys(name for entry in entries for name in entry["variants"]))
