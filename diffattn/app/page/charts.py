"""Charts of one run as SVG, in the colours of the surrounding page."""

from collections.abc import Sequence
from html import escape

from diffattn.app.jobs import RunTrace

WIDTH, LEFT, RIGHT, TOP = 720, 180, 12, 26
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
    ticks = "".join(
        _text(_x(call + 0.5, calls), bottom + 16, str(call + 1), "middle")
        for call in range(0, calls, max(1, calls // 12))
    )
    below = _text(LEFT, bottom + 36, "step, from noise to picture; dashed: n changes", "start")
    title = f"What the steps of {trace.title or 'the latest run'} did"
    return (
        f'<svg class="diffattn-chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {bottom + 44}" '
        f'xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"{bars}{line}{cells}{switches}{ticks}{below}</svg>"
    )


def _numbers(trace: RunTrace, y: float, height: float) -> str:
    """One bar per call; calls that ran exact are hatched empty frames."""
    calls, largest = len(trace.numbers), max((n for n in trace.numbers if n), default=1)
    found = [_text(LEFT - 8, y + 12, "agents or mediators n", "end")]
    if not any(trace.numbers):
        found.append(_text(LEFT, y + height / 2, "every step ran exact attention: there is no n", "start"))
        return "".join(found)
    found.append(_text(LEFT - 8, y + 28, f"largest: {largest}; empty: exact", "end", 0.65))
    for call, n in enumerate(trace.numbers):
        high = height if n is None else height * n / largest
        fill = f'fill="{BLUE}"' if n else 'fill="none" stroke="currentColor" stroke-opacity="0.3"'
        hint = f"step {call + 1}: " + (f"n = {n}" if n else "exact")
        found.append(_box(_x(call, calls), y + height - high, _x(1, calls) - LEFT, high, fill, hint))
    return "".join(found)


def _line(values: Sequence[float | None], y: float, height: float) -> str:
    calls, largest = len(values), max((v for v in values if v is not None), default=0) or 1
    points = [
        f"{_x(call + 0.5, calls):.1f},{y + height * (1 - v / largest):.1f}"
        for call, v in enumerate(values)
        if v is not None
    ]
    return (
        _text(LEFT - 8, y + 12, "change of the latents Δ", "end")
        + _text(LEFT - 8, y + 28, f"largest: {largest:.3g}", "end", 0.65)
        + f'<polyline points="{" ".join(points)}" fill="none" stroke="{ORANGE}" stroke-width="2"/>'
    )


def _heat_map(trace: RunTrace, y: float) -> tuple[str, float]:
    """The heat map (rows are layers, columns are calls) and its height."""
    calls, row = len(trace.accelerated), 16
    if not trace.layers:
        return _text(LEFT, y + 12, "no layer was patched", "start"), row
    found = [_text(LEFT, y - 8, "filled: the layer ran accelerated", "start", 0.65)]
    for i, layer in enumerate(trace.layers):
        short = layer.replace("transformer_blocks.", "").replace("attentions.", "").replace("_block", "")
        found.append(_text(LEFT - 8, y + row * i + 12, short[-29:], "end", size=10))
        for call in range(calls):
            ran = trace.accelerated[call][i]
            fill = f'fill="{BLUE}"' if ran else 'fill="currentColor" fill-opacity="0.08"'
            hint = f"{layer}, step {call + 1}: {'accelerated' if ran else 'exact'}"
            found.append(_box(_x(call, calls), y + row * i, _x(1, calls) - LEFT, row, fill, hint))
    return "".join(found), row * len(trace.layers)


def _x(call: float, calls: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * call / calls


def _box(x: float, y: float, width: float, height: float, fill: str, hint: str) -> str:
    size = f'width="{max(width - 1, 0.5):.1f}" height="{max(height - 1, 0.5):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {fill}><title>{escape(hint)}</title></rect>'


def _switch(x: float, top: float, bottom: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="currentColor" '
        'stroke-dasharray="4 3" stroke-opacity="0.7"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, opacity: float = 1, size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} font-size="{size}" fill-opacity="{opacity}">{escape(text)}</text>'
