"""Speed against quality, as SVG in the colours of the page, and the table of the same figures."""

import math
from collections.abc import Callable, Sequence
from html import escape

from diffattn.app.jobs.quality_run import Line, QualityRun, comparable, why_apart
from diffattn.app.jobs.suited import plain_name
from diffattn.app.page.shared import UNCOUNTED, note, table

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 62, 14, 30, 44
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16", "#64748b")
MARKS = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "M-5-5h10v10h-10z", "M0-6L6 5H-6z", "M0-6L6 0L0 6L-6 0z")
TIME, WORK = "seconds per picture", "GFLOPs per picture"
HEAD = ("run", "acceleration", "s per picture (middle half)", "speed-up", "GFLOPs", "FID-N", "KID ± std",
        "precision", "recall")  # fmt: skip
BARS = (
    "Bars: KID ± standard deviation over subsets of the pictures, and the middle half of the times. "
    "FID is one figure of all N pictures and has no error bar. Grey: exact attention ± its standard deviation."
)

Bar = tuple[float, float, float]  # value, low, high


def results(runs: Sequence[QualityRun], horizontal: str) -> str:
    """Charts and tables; runs whose figures cannot be compared are shown separately, with the reason."""
    if not runs:
        return note("No run is chosen: tick one above, or measure.")
    groups = comparable(runs, by_time=horizontal == TIME)
    parts = []
    for group in groups:
        first = group[0].lines[0].quality
        p = first.protocol
        apart = ""
        if group is not groups[0]:
            apart = f" Not comparable with the runs above: {_in_words(group[0], groups[0][0])}."
        parts.append(f"<h3>{escape(str(group[0].model))}: {escape(first.label)}</h3>")
        parts.append(note(f"{p.steps} steps, guidance {p.guidance}, {p.sampler}, {p.dtype}; {group[0].where}.{apart}"))
        rows, skip = [_row(run, line) for run in group for line in run.lines], len(group) == 1
        parts += [note(said) for run in group if (said := verdict(run))]
        parts.append(_charts(group, horizontal) + _legend(group) + table(HEAD[skip:], [row[skip:] for row in rows]))
        if any(line.gflops is None for run in group for line in run.lines):
            parts.append(note(UNCOUNTED))
    return f'<div class="diffattn-results">{"".join(parts)}</div>'


def _in_words(run: QualityRun, above: QualityRun) -> str:
    """What keeps two runs from being compared, the important differences alone if there are any."""
    names = why_apart(run, above).split(", ")
    words = {"num pictures": "other N", "reference": "other reference", "extractor": "other features",
             "steps": "other number of steps", "guidance": "other guidance", "machine": "other machine"}  # fmt: skip
    found = ["other model"] * (run.model != above.model) + [words[name] for name in names if name in words]
    return ", ".join(found) or f"other {', '.join(names)}"


def _row(run: QualityRun, line: Line) -> tuple[str, ...]:
    s, scores = line.seconds, line.quality.scores

    def share(name: str) -> str:
        return f"{scores[name]:.2f}" if name in scores else "–"

    return (
        run.title, line.acceleration, f"{s.median:.2f} ({s.q25:.2f}–{s.q75:.2f})", f"{line.speedup:.2f}×",
        "–" if line.gflops is None else f"{line.gflops:.3g}", f"{scores['fid']:.2f}",
        f"{scores['kid']:.3f} ± {scores['kid_std']:.3f}", share("precision"), share("recall"),
    )  # fmt: skip


def _charts(group: Sequence[QualityRun], horizontal: str) -> str:
    count = group[0].lines[0].quality.protocol.num_pictures

    def fid(line: Line) -> Bar:
        value = line.quality.scores["fid"]
        return value, value, value

    def kid(line: Line) -> Bar:
        mean, std = line.quality.scores["kid"], line.quality.scores["kid_std"]
        return mean, mean - std, mean + std

    panels = [_panel(group, horizontal, f"FID-{count}", fid), _panel(group, horizontal, "KID ± std", kid)]
    return f'<div class="diffattn-panels">{"".join(panels)}</div>'


def _panel(group: Sequence[QualityRun], horizontal: str, vertical: str, value: Callable[[Line], Bar]) -> str:
    points = []
    for i, run in enumerate(group):
        for line in run.lines:
            if (x := _across(line, horizontal)) is not None:
                points.append((i, run, line, x, value(line)))
    if not points:
        return ""
    across = _Scale([v for *_, x, _ in points for v in x] + [0.0], LEFT, WIDTH - RIGHT)
    upward = _Scale([v for *_, y in points for v in y] + [0.0], HEIGHT - BOTTOM, TOP)  # from 0: no noise is magnified
    colours = _colours(group)
    body = "".join(
        _point(
            across, upward, x, y, colours[line.acceleration], MARKS[i % len(MARKS)], f"{run.title}: {line.acceleration}"
        )
        for i, run, line, x, y in points
    )
    label = f"{vertical} against {horizontal}, lower is better on both axes"
    return (
        f'<svg class="diffattn-chart diffattn-panel" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"{_axes(across, upward, horizontal, vertical)}{_noise(points, upward)}{body}</svg>"
    )


def _noise(points: Sequence[tuple[int, QualityRun, Line, Bar, Bar]], upward: "_Scale") -> str:
    """A band over what chance may do to exact attention: figures within it do not differ from it."""
    bands = [y for _, run, line, _, y in points if line is run.lines[0] and y[1] < y[2]]
    return "".join(
        f'<rect x="{LEFT}" y="{upward(high):.1f}" width="{WIDTH - RIGHT - LEFT}" '
        f'height="{upward(low) - upward(high):.1f}" fill="currentColor" fill-opacity="0.08">'
        "<title>exact attention, plus and minus a standard deviation</title></rect>"
        for _, low, high in bands
    )


def verdict(run: QualityRun) -> str:
    """One sentence about a run: how much faster, and whether quality moved by more than chance."""
    exact, found = run.lines[0], []
    scores, std = exact.quality.scores, exact.quality.scores["kid_std"]
    for line in run.lines[1:]:
        moved = line.quality.scores["kid"] - scores["kid"]
        worse = "worse" if moved > 0 else "better"
        kid = "KID as exact's, within chance" if abs(moved) <= std else f"KID {worse} by {abs(moved):.3f}"
        found.append(f"{plain_name(line.acceleration)} {line.speedup:.2f}× as fast, {kid}")
    return f"Against exact attention: {'; '.join(found)}." if found else ""


def _across(line: Line, horizontal: str) -> Bar | None:
    if horizontal == TIME:
        return line.seconds.median, line.seconds.q25, line.seconds.q75
    return None if line.gflops is None else (line.gflops, line.gflops, line.gflops)


class _Scale:
    """Maps values to positions on an axis, with ticks at round values."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high, self.begin, self.end = low - room if low else 0.0, high + room, begin, end

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten, six at most."""
        least = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= least)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [k * step for k in range(first, last + 1)]


def _axes(across: _Scale, upward: _Scale, horizontal: str, vertical: str) -> str:
    parts = [f'<text x="{LEFT}" y="16" font-weight="600">{escape(vertical)} (lower is better)</text>']
    for tick in upward.ticks():
        y = upward(tick)
        place = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {place} stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in across.ticks():
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(horizontal)}</text>')
    return "".join(parts)


def _point(across: _Scale, upward: _Scale, x: Bar, y: Bar, colour: str, mark: str, what: str) -> str:
    left, mid, right = across(x[1]), across(x[0]), across(x[2])
    low, middle, high = upward(y[1]), upward(y[0]), upward(y[2])
    bars = (
        f'<path d="M{left:.1f} {middle:.1f}H{right:.1f}M{mid:.1f} {low:.1f}V{high:.1f}" '
        f'stroke="{colour}" stroke-opacity="0.6" fill="none"/>'
    )
    hint = f"<title>{escape(f'{what}: {x[0]:.3g}, {y[0]:.3g}')}</title>"
    return f'{bars}<path d="{mark}" transform="translate({mid:.1f} {middle:.1f})" fill="{colour}">{hint}</path>'


def _colours(group: Sequence[QualityRun]) -> dict[str, str]:
    names = dict.fromkeys(line.acceleration for run in group for line in run.lines)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _legend(group: Sequence[QualityRun]) -> str:
    """Colours are accelerations, shapes are runs."""
    items = [(MARKS[0], colour, name) for name, colour in _colours(group).items()]
    if len(group) > 1:
        items += [(MARKS[i % len(MARKS)], "currentColor", run.title) for i, run in enumerate(group)]
    chips = "".join(
        f'<span><svg width="14" height="14" viewBox="-7 -7 14 14"><path d="{mark}" fill="{colour}"/></svg> '
        f"{escape(name)}</span>"
        for mark, colour, name in items
    )
    return f'<p class="diffattn-legend">{chips}</p>' + note(BARS)
