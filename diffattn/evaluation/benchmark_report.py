"""The benchmark's results for people: a table, and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattn.evaluation.benchmark_variants import FLOOR, SDPA, VARIANTS
from diffattn.evaluation.machine import where

HEAD = ("variant", "seconds", "IQR", "speed-up", "time ratio", "IQR", "of floor's saving", "layers", "peak MiB")
COLOURS = dict(zip(VARIANTS, ("black", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "0.55"), strict=True))


def table(results: Mapping[str, Any]) -> str:
    """Every result as a text table, with what it was measured on."""
    machine, settings = results["machine"], results["settings"]
    head = f"{where(machine)}; {settings['dtype']}, batch {settings['batch']}, torch {machine['versions']['torch']}"
    return "\n\n".join([head, *(_section(entry) for entry in results["results"])])


def _section(entry: Mapping[str, Any]) -> str:
    levels = ", ".join(f"{level} ({entry['tokens'][str(level)]} tokens)" for level in entry["levels"])
    state = "" if entry["complete"] else ", incomplete"
    rows = [HEAD, *(_row(name, variant) for name, variant in entry["variants"].items())]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    lines = ["  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip() for row in rows]
    title = f"{entry['title']}, {entry['size']} px, {entry['mode']}, {entry['rounds']} rounds{state}; levels {levels}"
    return "\n".join([title, *lines, *(f"{name} left out: {why}" for name, why in entry["left_out"].items())])


def _row(name: str, variant: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, ratio = variant["seconds"], variant["time_ratio"]
    share, peak = variant.get("share_of_floor_saving"), variant.get("peak_mib")
    return (
        name,
        f"{seconds['median']:.4g}",
        f"{seconds['iqr'][0]:.4g}-{seconds['iqr'][1]:.4g}",
        f"{variant['speedup']:.2f}",
        f"{ratio['median']:.3f}",
        f"{ratio['iqr'][0]:.3f}-{ratio['iqr'][1]:.3f}",
        "" if share is None else f"{share:.0%}",
        str(variant["layers"]),
        "" if peak is None else f"{peak:.0f}",
    )


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time ratio to exact attention over the size, one panel per model and mode; bars are interquartile ranges.

    Raises:
        ValueError: matplotlib is not installed, or there is no result.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'diffattn[eval]'") from None
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in results["results"]:
        groups.setdefault((entry["title"], entry["mode"]), []).append(entry)
    if not groups:
        raise ValueError("there is no result to plot")
    figure = Figure(figsize=(5.2 * len(groups), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, ((title, mode), entries) in zip(axes, groups.items(), strict=True):
        _panel(axis, entries)
        axis.set_title(f"{title}, {mode}", fontsize=10)
    axes[0].set_ylabel("time of one step / time with exact attention")
    settings = results["settings"]
    figure.suptitle(f"{where(results['machine'])}, {settings['dtype']}, batch {settings['batch']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    entries = sorted(entries, key=lambda entry: entry["size"])
    for name, colour in COLOURS.items():
        found = [(e["size"], e["variants"][name]["time_ratio"]) for e in entries if name in e["variants"]]
        if not found or name == SDPA:
            continue
        sizes = [size for size, _ in found]
        middle = [ratio["median"] for _, ratio in found]
        below = [m - ratio["iqr"][0] for m, (_, ratio) in zip(middle, found, strict=True)]
        above = [ratio["iqr"][1] - m for m, (_, ratio) in zip(middle, found, strict=True)]
        label = "floor (no attention)" if name == FLOOR else name
        style = {"linestyle": "--"} if name == FLOOR else {"marker": "o"}
        axis.errorbar(sizes, middle, yerr=[below, above], color=colour, capsize=3, label=label, **style)
    axis.axhline(1, color=COLOURS[SDPA], linewidth=1, label="exact (SDPA)")
    sizes = [entry["size"] for entry in entries]
    axis.set_xticks(sizes, [f"{size}²" for size in sizes])
    axis.set_xlabel("pixels")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
