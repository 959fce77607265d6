"""The mediator benchmark's results for people: tables, from where mediators pay, and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffattn.evaluation.machine import where
from diffattn.evaluation.mediator_models import SOFTMAX

HEAD = ("variant", "seconds", "IQR", "speed-up", "time ratio", "IQR", "GFLOPs", "peak MiB")
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#56B4E9", "0.55")


def table(results: Mapping[str, Any]) -> str:
    """Every result as a text table, with what it was measured on, then from how many tokens on mediators pay."""
    head = (
        f"{_conditions(results)}, torch {results['machine']['versions']['torch']}\n"
        "training is forward and backward, without an optimizer; peak MiB is what a call held beyond weights and inputs"
    )
    left_out = [f"{e['model']}, {e['size']} tokens, {e['mode']}: left out, {e['why']}" for e in results["left_out"]]
    entries = sorted(results["results"], key=lambda e: (e["model"], e["mode"], e["size"]))
    return "\n\n".join(filter(None, [head, *map(_section, entries), "\n".join(left_out), _pays(results)]))


def _conditions(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    return f"{where(results['machine'])}, {settings['dtype']}, batch {settings['batch']}"


def _section(entry: Mapping[str, Any]) -> str:
    state = "" if entry["complete"] else ", incomplete"
    rows = [HEAD, *(_row(name, variant) for name, variant in entry["variants"].items())]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    lines = ["  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip() for row in rows]
    title = f"{entry['model']}, {entry['size']} tokens, {entry['mode']}, {entry['rounds']} rounds{state}"
    return "\n".join([title, *lines])


def _row(name: str, variant: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, ratio, peak = variant["seconds"], variant["time_ratio"], variant["peak_mib"]
    return (
        name if name == SOFTMAX else f"n={name}",
        f"{seconds['median']:.4g}",
        f"{seconds['iqr'][0]:.4g}-{seconds['iqr'][1]:.4g}",
        f"{variant['speedup']:.2f}",
        f"{ratio['median']:.3f}",
        f"{ratio['iqr'][0]:.3f}-{ratio['iqr'][1]:.3f}",
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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'diffattn[eval]'") from None
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in sorted(results["results"], key=lambda e: (e["model"], e["mode"], e["size"])):
        groups.setdefault((entry["model"], entry["mode"]), []).append(entry)
    if not groups:
        raise ValueError("there is no result to plot")
    figure = Figure(figsize=(4 * len(groups), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, ((model, mode), entries) in zip(axes, groups.items(), strict=True):
        _panel(axis, entries)
        axis.set_title(f"{model}, {mode}", fontsize=10)
    axes[0].set_ylabel("time / time with softmax attention")
    figure.suptitle(_conditions(results), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, entries: list[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for entry in entries for name in entry["variants"] if name != SOFTMAX)
    for i, name in enumerate(names):
        found = [(e["size"], e["variants"][name]["time_ratio"]) for e in entries if name in e["variants"]]
        middle = [ratio["median"] for _, ratio in found]
        below = [m - ratio["iqr"][0] for m, (_, ratio) in zip(middle, found, strict=True)]
        above = [ratio["iqr"][1] - m for m, (_, ratio) in zip(middle, found, strict=True)]
        style = {"marker": "o", "capsize": 3, "color": COLOURS[i % len(COLOURS)], "label": f"n={name}"}
        axis.errorbar([size for size, _ in found], middle, yerr=[below, above], **style)
    axis.axhline(1, color="black", linewidth=1, label="softmax (SDPA)")
    sizes = [entry["size"] for entry in entries]
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xlabel("tokens")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
