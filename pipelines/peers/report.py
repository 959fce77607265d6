"""The report: a Markdown table, and a plot of quality against time."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from diffattn.machine import where

from . import FLOOR, SDPA, family
from .labels import place_labels
from .pictures import GROUPS, all_values
from .timing import Rounds, gains, names_in, ratio, seconds, share_of_saving

COLOURS = {
    SDPA: "black", "steps": "0.5", "agent": "#0072B2", "tome": "#009E73", "keys": "#E69F00", "tiles": "#D55E00",
    "deepcache": "#CC79A7", "tgate": "#8B5A2B", "sada": "#332288", "cachedit": "#882255", "combined": "#56B4E9",
    "recipe": "#117733", FLOOR: "0.75",
}  # fmt: skip
QUALITY_NOTES = (
    "Means over pictures, each against the unaccelerated picture of the same prompt and seed. Bold: nothing else is "
    "both faster and closer over the foreground. "
    "Foreground: where any channel of the unaccelerated picture is below 0.97, and 2 pixels around. "
    "Latent error: |x - x*| / |x*| of the final latents.",
)

Entry = Mapping[str, Any]


def other_seeds(number: int) -> str:
    """The name of exact attention with the `number`-th set of other seeds."""
    return f"{SDPA}, other seeds {number}"


def markdown(data: Mapping[str, Any]) -> str:
    """Every entry as a table, with what it was measured on and how."""
    machine, protocol = data["machine"], data["protocol"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    lines = [
        f"Measured on {where(machine)}; {versions}.",
        "Protocol: " + "; ".join(f"{key.replace('_', ' ')} {_told(value)}" for key, value in protocol.items()) + ".",
    ]
    for name, entry in data["entries"].items():
        rows, notes = (_quality(entry), QUALITY_NOTES) if entry["pictures"] else (_speed(entry), ())
        head, *body = rows
        table = [_line(head), "|" + "---|" * len(head), *map(_line, body)]
        title = f"## {entry.get('title', name)}"
        left_out = [f"{variant} left out: {why}" for variant, why in entry["left_out"].items()]
        made = [f"Commit {', '.join(map(str, entry['commits']))}: " + ", ".join(f"`{c}`" for c in entry["commands"])]
        notes = [*notes, *_by_chance(entry), *_gains(entry), *left_out, *made]
        lines += ["", title, "", *table, "", *(f"- {text}" for text in notes)]
    return "\n".join(lines).rstrip() + "\n"


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (x, y) that none other beats: no one is left of or above it and not worse in the other."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())

    return [name for name, (x, y) in points.items() if not beaten(x, y)]


def quality_points(entry: Entry, rounds: Rounds | None = None) -> dict[str, tuple[float, float]]:
    """Variant -> (median time ratio, mean foreground PSNR in dB); those that changed no picture are left out.

    Args:
        entry: with the pictures.
        rounds: the times; None: those of the entry.
    """
    found = {}
    for name, pictures in entry["pictures"].items():
        values, time = all_values(pictures, "foreground_psnr"), ratio(rounds or entry["rounds"], name)
        if values and time is not None and name not in (SDPA, FLOOR):
            found[name] = (time.median, fmean(values))
    return found


def _quality(entry: Entry) -> list[tuple[str, ...]]:
    both = " / ".join(group for group in GROUPS if any(group in p for p in entry["pictures"].values()))
    n = next((len(p[g]["ssim"]) for p in entry["pictures"].values() for g in GROUPS if g in p), 0)
    head = ("variant", "time ratio (IQR)", f"foreground PSNR, dB ({both}; {n} pictures each)", "PSNR, dB", "SSIM",
            "latent error", "KID × 10³ ± std", "FID", "layers accelerated")  # fmt: skip
    best = front({SDPA: (1.0, inf), **quality_points(entry)})
    rows: list[tuple[str, ...]] = [head]
    names = sorted(entry["pictures"], key=lambda name: -_median(entry, name))
    for name in names:
        pictures = entry["pictures"][name]
        metrics = ("foreground_psnr", "psnr", "ssim", "latent_error")
        cells = [" / ".join(_mean(pictures, m, g) for g in GROUPS if g in pictures) for m in metrics]
        title = f"**{name}**" if name in best else name
        rows.append((title, _ratio(entry, name), *cells, *_scores(entry, name), _layers(entry, name)))
    for name in _seed_sets(entry)[1:]:
        rows.append((name, *[""] * 5, *_scores(entry, name), ""))
    used = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in used) for row in rows]


def _speed(entry: Entry) -> list[tuple[str, ...]]:
    head = (
        "variant",
        "rounds",
        "seconds per run",
        "time ratio (IQR)",
        "speed-up",
        "of floor's saving",
        "layers accelerated",
        "peak MiB",
    )
    rows: list[tuple[str, ...]] = [head]
    for name in sorted(names_in(entry["rounds"]), key=lambda name: -_median(entry, name)):
        spread, time = ratio(entry["rounds"], name), seconds(entry["rounds"], name)
        assert spread is not None
        assert time is not None
        share = None if name in (SDPA, FLOOR) else share_of_saving(entry["rounds"], name, FLOOR)
        peak = entry["peak_mib"].get(name)
        rows.append((name, str(sum(name in r for r in entry["rounds"])), f"{time.median:.4g}", _ratio(entry, name),
                     f"{1 / spread.median:.2f}", "" if share is None else f"{share.median:.0%}",
                     _layers(entry, name), "" if peak is None else f"{peak:.0f}"))  # fmt: skip
    used = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in used) for row in rows]


def _gains(entry: Entry) -> list[str]:
    """What a combination adds to each of its parts."""
    return [
        f"{name} is {spread.median:.2f}x as fast as {part} alone (IQR {spread.q25:.2f} to {spread.q75:.2f})"
        for name, part, spread in gains(entry["rounds"])
    ]


def _seed_sets(entry: Entry) -> list[str]:
    """Exact attention with every set of seeds it was scored with, the variants' own set first."""
    return [name for name in entry["scores"] if name.partition(",")[0] == SDPA]


def _by_chance(entry: Entry) -> list[str]:
    """Which variants' KID is no higher than seeds alone make that of exact attention."""
    kid = {name: s["scores"]["kid"] for name, s in entry["scores"].items()}
    exact = [kid[name] for name in _seed_sets(entry)]
    if len(exact) < 2:
        return []
    others = [name for name in kid if name not in _seed_sets(entry)]
    within = ", ".join(name for name in others if kid[name] <= max(exact)) or "none"
    above = ", ".join(name for name in others if kid[name] > max(exact)) or "none"
    spread = f"{1e3 * min(exact):.2f} to {1e3 * max(exact):.2f}"
    return [
        f"KID × 10³ of exact attention over {len(exact)} sets of seeds: {spread}. No higher: {within}. Above: {above}."
    ]


def plot(entry: Entry, caption: str, path: Path, rounds: Rounds | None = None) -> None:
    """Quality over time ratio, two panels: foreground PSNR; and FID (KID where pictures are few), or the latent error
    where nothing was scored. The line joins what nothing else beats. What changed no picture is left out.

    Args:
        entry: with the pictures and scores.
        caption: above both panels.
        path: of the PNG.
        rounds: the times, if they are not the entry's: of another model.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'diffattn[eval]'") from None
    figure = Figure(figsize=(15, 7), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _panel(left, quality_points(entry, rounds), "PSNR over the foreground, dB (higher is closer)", higher=True)
    points, label = _second(entry, rounds or entry["rounds"])
    _panel(right, points, label, higher=False)
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _second(entry: Entry, rounds: Rounds) -> tuple[dict[str, tuple[float, float]], str]:
    if entry["scores"]:
        key, label = ("fid", "FID") if _has_fid(entry) else ("kid", "KID")
        protocol = next(iter(entry["scores"].values()))["protocol"]
        label += f"-{protocol['num_pictures']} ({protocol['extractor']}, {protocol['reference']}; lower is better)"
        values = {n: s["scores"][key] for n, s in entry["scores"].items() if n in names_in(rounds)}
    else:
        label = "relative error of the final latents (lower is closer)"
        values = {n: fmean(found) for n, p in entry["pictures"].items() if (found := all_values(p, "latent_error"))}
    idle = {n for n, p in entry["pictures"].items() if n != SDPA and all(g["identical"] for g in p.values())}
    times = {name: ratio(rounds, name) for name in values if name not in (*idle, FLOOR)}
    return {name: (time.median, values[name]) for name, time in times.items() if time is not None}, label


def _panel(axis: Any, points: Mapping[str, tuple[float, float]], label: str, higher: bool) -> None:
    sign = 1 if higher else -1
    for name, (x, y) in points.items():
        axis.plot(x, y, "D" if "+" in name else "o", color=COLOURS[family(name)], markersize=7)
    exact = {} if SDPA in points else {SDPA: (1.0, inf)}
    best = front({**exact, **{name: (x, sign * y) for name, (x, y) in points.items()}})
    line = sorted(points[name] for name in best if name in points)
    axis.plot([x for x, _ in line], [y for _, y in line], color="0.6", linewidth=1, zorder=0)
    axis.margins(0.12)
    if not higher:
        axis.invert_yaxis()  # up and to the left is better in both panels
    axis.set_xlabel("time of a run / time with exact attention")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    place_labels(axis, {name: (*point, COLOURS[family(name)]) for name, point in points.items()})


def _has_fid(entry: Entry) -> bool:
    """Fewer pictures than features make the FID meaningless: then only the KID is shown."""
    return all(s["enough_for_fid"] for s in entry["scores"].values())


def _scores(entry: Entry, name: str) -> tuple[str, str]:
    if name not in entry["scores"]:
        return "", ""
    s = entry["scores"][name]["scores"]
    kid = f"{1e3 * s['kid']:.2f} ± {1e3 * s['kid_std']:.2f}"
    return kid, f"{s['fid']:.2f}" if _has_fid(entry) else ""


def _mean(pictures: Mapping[str, Any], metric: str, group: str) -> str:
    if pictures[group]["identical"]:
        return "identical" if metric == "foreground_psnr" else "="
    values = all_values(pictures, metric, [group])
    digits = 1 if "psnr" in metric else 3
    return f"{fmean(values):.{digits}f}" if values else "-"


def _median(entry: Entry, name: str) -> float:
    found = ratio(entry["rounds"], name)
    return found.median if found is not None else inf


def _ratio(entry: Entry, name: str) -> str:
    found = ratio(entry["rounds"], name)
    return f"{found.median:.3f} ({found.q25:.3f}-{found.q75:.3f})" if found is not None else "-"


def _layers(entry: Entry, name: str) -> str:
    return str(entry["layers"].get(name, ""))


def _told(value: Any) -> str:
    if isinstance(value, Mapping):  # prompts by group
        return ", ".join(f"{len(found)} {group}" for group, found in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
