"""Speed against quality, as SVG in the colours of the page, and the table of the same figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from diffattn.app.jobs.choices import UNPATCHED
from diffattn.app.jobs.quality_run import Line, QualityRun, comparable, why_apart
from diffattn.app.jobs.suited import plain_name
from diffattn.app.page.scale import Scale
from diffattn.app.page.shared import UNCOUNTED, cut, note, table

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 62, 14, 30, 44
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16", "#64748b")
MARKS = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "M-5-5h10v10h-10z", "M0-6L6 5H-6z", "M0-6L6 0L0 6L-6 0z")
TIME, WORK = "seconds per picture", "GFLOPs per picture"
HEAD = ("run", "acceleration", "s per picture (middle half)", "speed-up (95 % interval)", "GFLOPs", "FID-N ± std",
        "KID ± std", "precision", "recall")  # fmt: skip
BARS = (
    "Bars: the middle half of the times; KID ± its standard deviation over subsets of the pictures; FID ± what other "
    "seeds may do to it (jackknife). Grey band: exact attention ± that; figures within it do not differ."
)
NO_BAND = "FID was measured without its spread here: small differences may be chance."
LONGEST = 200  # characters of a line that says what a run is
LABEL = 22  # characters of a point's name
APART = 13  # pixels between the names of two points
BESIDE = 24  # pixels from the points to their names

Bar = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class _Point:
    """One way to draw in a chart."""

    shape: int  # of the run's mark
    run: QualityRun
    line: Line
    name: str
    x: Bar
    y: Bar


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
        how = f"{p.steps} steps, guidance {p.guidance}, {p.sampler}, {p.dtype}; {group[0].where}"
        parts.append(f"<h2>{escape(cut(f'{group[0].model}: {first.label}', LONGEST))}</h2>")
        parts.append(note(f"{cut(how, LONGEST)}.{apart}"))
        rows, skip = [row for run in group for row in _rows(run)], len(group) == 1
        parts += [note(said) for run in group if (said := verdict(run))]
        parts.append(_charts(group, horizontal) + _legend(group) + table(HEAD[skip:], [row[skip:] for row in rows]))
        if any(line.gflops is None for run in group for line in run.lines):
            parts.append(note(UNCOUNTED))
        if any("fid_std" not in run.lines[0].quality.scores for run in group):
            parts.append(note(NO_BAND))
    return f'<div class="diffattn-results">{"".join(parts)}{note(BARS)}</div>'


def _in_words(run: QualityRun, above: QualityRun) -> str:
    """Why two runs cannot be compared: only the important differences, if there are any."""
    names = why_apart(run, above).split(", ")
    words = {"num pictures": "other N", "reference": "other reference", "extractor": "other features",
             "steps": "other number of steps", "guidance": "other guidance", "machine": "other machine"}  # fmt: skip
    found = ["other model"] * (run.model != above.model) + [words[name] for name in names if name in words]
    return ", ".join(found) or f"other {', '.join(names)}"


def _rows(run: QualityRun) -> list[tuple[str, ...]]:
    return [_row(run, name, line) for name, line in zip(names_of(run), run.lines, strict=True)]


def _row(run: QualityRun, name: str, line: Line) -> tuple[str, ...]:
    s, scores = line.seconds, line.quality.scores

    def share(score: str) -> str:
        return f"{scores[score]:.2f}" if score in scores else "–"

    span = f" ({line.span[0]:.2f}–{line.span[1]:.2f})" if line.span else ""
    chance = f" ± {scores['fid_std']:.2f}" if "fid_std" in scores else ""
    return (
        run.title, name, f"{s.median:.2f} ({s.q25:.2f}–{s.q75:.2f})", f"{line.speedup:.2f}×{span}",
        "–" if line.gflops is None else f"{line.gflops:.3g}", f"{scores['fid']:.2f}{chance}",
        f"{scores['kid']:.3f} ± {scores['kid_std']:.3f}", share("precision"), share("recall"),
    )  # fmt: skip


def _charts(group: Sequence[QualityRun], horizontal: str) -> str:
    count = group[0].lines[0].quality.protocol.num_pictures

    def fid(line: Line) -> Bar:
        value, std = line.quality.scores["fid"], line.quality.scores.get("fid_std", 0.0)
        return value, value - std, value + std

    def kid(line: Line) -> Bar:
        mean, std = line.quality.scores["kid"], line.quality.scores["kid_std"]
        return mean, mean - std, mean + std

    panels = [_panel(group, horizontal, f"FID-{count} ± std", fid), _panel(group, horizontal, "KID ± std", kid)]
    focusable = 'tabindex="0" role="group" aria-label="Charts"'  # so that the keyboard can scroll it
    return f'<div class="diffattn-panels" {focusable}>{"".join(panels)}</div>'


def _panel(group: Sequence[QualityRun], horizontal: str, vertical: str, value: Callable[[Line], Bar]) -> str:
    points = list[_Point]()
    for i, run in enumerate(group):
        for name, line in zip(names_of(run), run.lines, strict=True):
            if (x := _across(line, horizontal)) is not None:
                points.append(_Point(i, run, line, name, x, value(line)))
    if not points:
        return ""
    across = Scale([v for point in points for v in point.x] + [0.0], LEFT, WIDTH - RIGHT)
    upward = Scale([v for point in points for v in point.y] + [0.0], HEIGHT - BOTTOM, TOP)  # from 0: noise stays small
    colours = _colours(group)
    body = "".join(_drawn(point, across, upward, colours[point.line.acceleration]) for point in points)
    names = _names([(across(point.x[0]), upward(point.y[0]), point.name) for point in points])
    label = f"{vertical} against {horizontal}, lower is better on both axes"
    return (
        f'<svg class="diffattn-chart diffattn-panel" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"{_axes(across, upward, horizontal, vertical)}{_noise(points, upward)}{names}{body}</svg>"
    )


def _noise(points: Sequence[_Point], upward: Scale) -> str:
    """A band over the spread of exact attention by chance: figures within it do not differ from it."""
    bands = [point.y for point in points if point.line is point.run.lines[0] and point.y[1] < point.y[2]]
    return "".join(
        f'<rect x="{LEFT}" y="{upward(high):.1f}" width="{WIDTH - RIGHT - LEFT}" '
        f'height="{upward(low) - upward(high):.1f}" fill="currentColor" fill-opacity="0.08">'
        "<title>exact attention, plus and minus a standard deviation</title></rect>"
        for _, low, high in bands
    )


def _names(points: Sequence[tuple[float, float, str]]) -> str:
    """The names of points (x, y, name): in a column beside those of each half of the chart, one below the other."""
    middle, found = (LEFT + WIDTH - RIGHT) / 2, list[str]()
    halves = ([p for p in points if p[0] > middle], [p for p in points if p[0] <= middle])
    for half, outward, anchor in zip(halves, (-1, 1), ("end", "start"), strict=True):
        taken = list[tuple[float, float]]()
        edge = min((outward * -x for x, _, _ in half), default=0.0)  # of the points, towards the names
        at = -outward * edge + outward * BESIDE
        for x, y, name in sorted(half, key=lambda point: point[1]):
            level = min(_free_levels(y, taken), key=lambda free: abs(free - y))
            taken.append((level, level + APART))
            found.append(
                f'<path d="M{x:.1f} {y:.1f}L{at - outward * 3:.1f} {level:.1f}" stroke="currentColor" fill="none" '
                'stroke-opacity="0.35"/>'
            )
            found.append(
                f'<text x="{at:.1f}" y="{level + 4:.1f}" text-anchor="{anchor}" font-size="11">'
                f"{escape(cut(name, LABEL))}</text>"
            )
    return "".join(found)


def _free_levels(y: float, taken: Sequence[tuple[float, float]]) -> list[float]:
    """Heights near y at which a name overlaps none of those taken, within the chart."""
    levels = [y + APART * k for k in range(-len(taken) - 1, len(taken) + 2)]
    levels += [end for _, end in taken] + [begin - APART for begin, _ in taken]
    free = [v for v in levels if all(v >= end or v + APART <= begin for begin, end in taken)]
    within = [v for v in free if TOP <= v <= HEIGHT - BOTTOM]
    return within or free


def names_of(run: QualityRun) -> list[str]:
    """The variants of a run in plain words; the method is omitted if all have the same."""
    methods = {line.acceleration.partition("/")[0] for line in run.lines if "/" in line.acceleration}
    own = next(iter(methods)) if len(methods) == 1 else None
    return ["Exact" if x.acceleration == UNPATCHED else plain_name(x.acceleration, own) for x in run.lines]


def verdict(run: QualityRun) -> str:
    """One sentence about a run: how much faster, and whether quality changed by more than chance."""
    exact = run.lines[0].quality.scores
    speeds = [f"{name} {_faster(line)}" for name, line in zip(names_of(run), run.lines, strict=True)][1:]
    moved = [_moved(line, exact) for line in run.lines[1:]]
    if not speeds:
        return ""
    if len(speeds) > 1 and len(set(moved)) == 1:
        return f"Against exact attention: {', '.join(speeds)}; in all, {moved[0]}."
    return f"Against exact attention: {'; '.join(f'{a}, {b}' for a, b in zip(speeds, moved, strict=True))}."


def _faster(line: Line) -> str:
    if line.span and line.span[0] <= 1 <= line.span[1]:
        return f"shows no difference in speed ({line.span[0]:.2f}–{line.span[1]:.2f}×)"
    return f"{line.speedup:.2f}× as fast"


def _moved(line: Line, exact: Mapping[str, float]) -> str:
    """How FID and KID changed; differences within a standard deviation of exact attention count as chance."""
    within, beyond = [], []
    for score in ("fid", "kid"):
        if f"{score}_std" not in exact:
            continue
        by, name = line.quality.scores[score] - exact[score], score.upper()
        if abs(by) <= exact[f"{score}_std"]:
            within.append(name)
        else:
            beyond.append(f"{name} {'worse' if by > 0 else 'better'} by {abs(by):.3g}")
    same = [f"{' and '.join(within)} as exact's, within chance"] if within else []
    return ", ".join(beyond + same)


def _across(line: Line, horizontal: str) -> Bar | None:
    if horizontal == TIME:
        return line.seconds.median, line.seconds.q25, line.seconds.q75
    return None if line.gflops is None else (line.gflops, line.gflops, line.gflops)


def _axes(across: Scale, upward: Scale, horizontal: str, vertical: str) -> str:
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


def _drawn(point: _Point, across: Scale, upward: Scale, colour: str) -> str:
    left, mid, right = across(point.x[1]), across(point.x[0]), across(point.x[2])
    low, middle, high = upward(point.y[1]), upward(point.y[0]), upward(point.y[2])
    bars = (
        f'<path d="M{left:.1f} {middle:.1f}H{right:.1f}M{mid:.1f} {low:.1f}V{high:.1f}" '
        f'stroke="{colour}" stroke-opacity="0.6" fill="none"/>'
    )
    hint = f"{point.run.title}: {point.name}: {point.x[0]:.3g}, {point.y[0]:.3g}"
    mark, place = MARKS[point.shape % len(MARKS)], f"translate({mid:.1f} {middle:.1f})"
    return f'{bars}<path d="{mark}" transform="{place}" fill="{colour}"><title>{escape(hint)}</title></path>'


def _colours(group: Sequence[QualityRun]) -> dict[str, str]:
    names = dict.fromkeys(line.acceleration for run in group for line in run.lines)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _legend(group: Sequence[QualityRun]) -> str:
    """Colours are accelerations, shapes are runs."""
    words = {x.acceleration: name for run in group for x, name in zip(run.lines, names_of(run), strict=True)}
    items = [(MARKS[0], colour, words[name]) for name, colour in _colours(group).items()]
    if len(group) > 1:
        items += [(MARKS[i % len(MARKS)], "currentColor", run.title) for i, run in enumerate(group)]
    chips = "".join(
        f'<span><svg width="14" height="14" viewBox="-7 -7 14 14"><path d="{mark}" fill="{colour}"/></svg> '
        f"{escape(name)}</span>"
        for mark, colour, name in items
    )
    return f'<p class="diffattn-legend">{chips}</p>'
