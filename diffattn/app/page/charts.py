"""Charts of one run as SVG, in the colours of the surrounding page."""

from collections.abc import Sequence
from html import escape

from diffattn.app.jobs import RunTrace
from diffattn.app.page.scale import Scale
from diffattn.app.page.shared import cut

WIDTH, LEFT, RIGHT, TOP = 760, 230, 12, 26
ROW = 16  # pixels of a layer
NAME = 28  # characters of a layer's name
BLUE, ORANGE = "#3b82f6", "#f59e0b"


def steps_chart(trace: RunTrace) -> str:
    """n(t) as bars, Δ_t as a line, the switches as dashed lines; below, the accelerated layers as a heat map."""
    calls = len(trace.seconds)
    if not calls:
        return ""
    bars = _numbers(trace, y=TOP, height=110)
    line = _line(trace.changes, y=TOP + 150, height=80)
    cells, height = _heat_map(trace, y=TOP + 270)
    bottom = TOP + 270 + height
    switches = "".join(_switch(_x(call, calls), TOP - 6, bottom) for call in trace.switches)
    below = _text(LEFT, bottom + 36, "step, from noise to picture; dashed: n changes", "start")
    title = f"What the steps of {trace.title or 'the latest run'} did"
    return (
        f'<svg class="diffattn-chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {bottom + 44}" '
        f'xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"{bars}{line}{cells}{switches}{_steps(calls, bottom)}{below}</svg>"
    )


def _steps(calls: int, bottom: float) -> str:
    """Numbers of steps under the chart, each with its tick."""
    found = []
    for call in range(0, calls, max(1, calls // 12)):
        x = _x(call + 0.5, calls)
        found.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="currentColor"/>')
        found.append(_text(x, bottom + 16, str(call + 1), "middle"))
    return "".join(found)


def _numbers(trace: RunTrace, y: float, height: float) -> str:
    """One bar per call; calls that ran exact are empty frames. The ticks are the numbers that were used."""
    calls, used = len(trace.numbers), sorted({n for n in trace.numbers if n})
    found = [_text(0, y + 12, "agents or mediators n", "start")]
    if not used:
        found.append(_text(LEFT, y + height / 2, "every step ran exact attention: there is no n", "start"))
        return "".join(found)
    found.append(_text(0, y + 28, "empty: exact", "start"))
    last = float("inf")
    for n in [0, *used]:
        level = y + height * (1 - n / used[-1])
        found.append(_grid(level))
        if last - level >= 12:  # else the labels would overlap
            found.append(_text(LEFT - 8, level + 4, str(n), "end", size=10))
            last = level
    for call, n in enumerate(trace.numbers):
        high = height if n is None else height * n / used[-1]
        fill = f'fill="{BLUE}"' if n else 'fill="none" stroke="currentColor" stroke-opacity="0.3"'
        hint = f"step {call + 1}: " + (f"n = {n}" if n else "exact")
        found.append(_box(_x(call, calls), y + height - high, _x(1, calls) - LEFT, high, fill, hint))
    return "".join(found)


def _line(values: Sequence[float | None], y: float, height: float) -> str:
    calls, known = len(values), [v for v in values if v is not None]
    found = [_text(0, y + 12, "change of the latents Δ", "start")]
    if not known:
        return "".join(found)
    upward = Scale([0.0, *known], y + height, y, most=4)
    for tick in upward.ticks():
        found += [_grid(upward(tick)), _text(LEFT - 8, upward(tick) + 4, f"{tick:.3g}", "end", size=10)]
    points = [
        f"{_x(call + 0.5, calls):.1f},{upward(value):.1f}" for call, value in enumerate(values) if value is not None
    ]
    found.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{ORANGE}" stroke-width="2"/>')
    return "".join(found)


def _heat_map(trace: RunTrace, y: float) -> tuple[str, float]:
    """The heat map (rows are layers in the network's order, columns are calls) and its height."""
    calls = len(trace.accelerated)
    if not trace.layers:
        return _text(LEFT, y + 12, "no layer was patched", "start"), ROW
    found = [
        _text(LEFT, y - 8, "filled: the layer ran accelerated", "start"),
        _text(0, y - 8, "layer", "start"),
        _text(LEFT - 8, y - 8, "tokens", "end"),
    ]
    for i, (layer, tokens) in enumerate(zip(trace.layers, trace.tokens, strict=True)):
        middle = y + ROW * i + 12
        found.append(_text(0, middle, cut(_short(layer), NAME), "start", size=10))
        found.append(_text(LEFT - 8, middle, "–" if tokens is None else f"{tokens:,}", "end", size=10))
        for call in range(calls):
            ran = trace.accelerated[call][i]
            fill = f'fill="{BLUE}"' if ran else 'fill="currentColor" fill-opacity="0.08"'
            hint = f"{layer}, step {call + 1}: {'accelerated' if ran else 'exact'}"
            found.append(_box(_x(call, calls), y + ROW * i, _x(1, calls) - LEFT, ROW, fill, hint))
    return "".join(found), ROW * len(trace.layers)


def _short(layer: str) -> str:
    """A layer's name without the words that all have."""
    for word in ("transformer_blocks.", "attentions.", "_blocks", "_block", ".processor"):
        layer = layer.replace(word, "")
    return layer


def _x(call: float, calls: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * call / calls


def _grid(y: float) -> str:
    """A line at a tick of the vertical axis."""
    place = f'x1="{LEFT - 4}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-opacity="0.15"/>'


def _box(x: float, y: float, width: float, height: float, fill: str, hint: str) -> str:
    size = f'width="{max(width - 1, 0.5):.1f}" height="{max(height - 1, 0.5):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {fill}><title>{escape(hint)}</title></rect>'


def _switch(x: float, top: float, bottom: float) -> str:
    return (
        f'<line class="switch" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="currentColor" '
        'stroke-dasharray="4 3" stroke-opacity="0.7"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} font-size="{size}">{escape(text)}</text>'
