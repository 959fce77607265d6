"""Draws the package graph as SVG, from the table that tests/test_architecture.py checks against the imports.

    python docs/hooks/package_graph.py > package-graph.svg

As a hook of mkdocs it replaces `<!-- package graph -->` in a page, so the picture is never older than the table.
"""

import ast
from collections.abc import Mapping
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = "MAY_IMPORT"
MARK = "<!-- package graph -->"
LABELS = {"__init__": "diffattn", "__main__": "python -m"}

WIDTH, HEIGHT, ROW, BEND = 104, 26, 76, 12
"""Pixels: a box, from one row to the next, and the space that an edge takes where it passes a row."""

Graph = Mapping[str, frozenset[str]]
"""Package -> the packages it imports."""

Way = tuple[tuple[str, str], ...]
"""The places an edge passes, top to bottom: (package, "") at both ends, (importing, imported) in the rows between."""

Stop = tuple[tuple[str, str], int]
"""A place and its row; row 0 is at the bottom."""


def read_table(source: str) -> Graph:
    """The table MAY_IMPORT of a Python source.

    Raises:
        ValueError: the source assigns no such table.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [TABLE]:
            return {name: frozenset(names.split()) for name, names in ast.literal_eval(node.value).items()}
    raise ValueError(f"the source assigns no {TABLE}")


def reduced(graph: Graph) -> Graph:
    """The graph without the edges that a longer way implies (its transitive reduction)."""
    below: dict[str, frozenset[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return {name: frozenset(o for o in used if not any(o in below[p] for p in used)) for name, used in graph.items()}


def layers_of(graph: Graph) -> dict[str, int]:
    """Package -> its row: 0 at the bottom imports nothing, every other stands just above the highest it imports."""
    layer: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        layer[name] = 1 + max((layer[other] for other in graph[name]), default=-1)
    return layer


def ways_of(graph: Graph, layer: Mapping[str, int]) -> list[tuple[Way, int]]:
    """Every edge as a way from row to row, and the row it starts from."""
    found = []
    for name, used in graph.items():
        for other in sorted(used):
            between = [(name, other)] * (layer[name] - layer[other] - 1)
            found.append((((name, ""), *between, (other, "")), layer[name]))
    return found


def neighbours(graph: Graph) -> tuple[list[list[tuple[str, str]]], dict[Stop, list[Stop]]]:
    """The places of every row, from the bottom up, and the neighbours of each above and below."""
    layer = layers_of(graph)
    rows: list[list[tuple[str, str]]] = [[] for _ in range(max(layer.values()) + 1)]
    near: dict[Stop, list[Stop]] = {}
    for name, row in layer.items():
        rows[row].append((name, ""))
    for way, top in ways_of(graph, layer):
        stops = [(place, top - i) for i, place in enumerate(way)]
        for place, row in stops[1:-1]:
            rows[row].append(place)
        for upper, lower in pairwise(stops):
            near.setdefault(upper, []).append(lower)
            near.setdefault(lower, []).append(upper)
    return rows, near


def places(graph: Graph) -> tuple[dict[Stop, float], float]:
    """x of the centre of every stop, and the width of the picture. Neighbours are brought near each other."""
    rows, near = neighbours(graph)
    width = max(sum(_room(place) for place in row) for row in rows)
    x = {(place, i): float(k) for i, row in enumerate(rows) for k, place in enumerate(row)}
    for _ in range(30):  # sort each row by the mean place of the neighbours, upwards and downwards in turn
        for i in (*range(len(rows)), *reversed(range(len(rows)))):
            mean = {p: fmean(x[n] for n in near.get((p, i), [(p, i)])) for p in rows[i]}
            rows[i].sort(key=mean.__getitem__)
            x |= {(place, i): at for place, at in _spread(rows[i], width)}
    return x, width


def _room(place: tuple[str, str]) -> int:
    return BEND if place[1] else WIDTH + BEND


def _spread(row: list[tuple[str, str]], width: float) -> list[tuple[tuple[str, str], float]]:
    """The places of a row with their centres, the spare width shared between them."""
    spare = (width - sum(_room(place) for place in row)) / len(row)
    left, found = 0.0, []
    for place in row:
        found.append((place, left + (spare + _room(place)) / 2))
        left += spare + _room(place)
    return found


def svg(graph: Graph) -> str:
    """The graph as SVG: importing packages above imported ones; edges that a longer way implies are left out."""
    edges = reduced(graph)
    layer = layers_of(edges)
    x, width = places(edges)
    top = max(layer.values())

    def point(place: tuple[str, str], row: int) -> tuple[float, float]:
        return x[place, row], BEND + HEIGHT / 2 + (top - row) * ROW

    lines = []
    for way, start in ways_of(edges, layer):
        points = [point(place, start - i) for i, place in enumerate(way)]
        lines += [_line(upper, lower) for upper, lower in pairwise(points)]
    boxes = [_box(LABELS.get(name, name), *point((name, ""), layer[name])) for name in edges]
    height = top * ROW + HEIGHT + 2 * BEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" font-size="12" '
        'font-family="sans-serif"><title>The packages of diffattn and what they import</title>'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From a place to one in the row below; it runs straight down past the boxes of its rows."""
    (x0, y0), (x1, y1), half = start, end, HEIGHT / 2
    bend = (y1 - y0) / 2
    path = (
        f"M{x0:.0f},{y0:.0f} V{y0 + half:.0f} "
        f"C{x0:.0f},{y0 + bend:.0f} {x1:.0f},{y1 - bend:.0f} {x1:.0f},{y1 - half:.0f} V{y1:.0f}"
    )
    return f'<path d="{path}" fill="none" stroke="#8a94a6" stroke-width="1.2"/>'


def _box(label: str, x: float, y: float) -> str:
    left, top = x - WIDTH / 2, y - HEIGHT / 2
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="#eef2ff" stroke="#3949ab"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#1a237e">{label}</text>'
    )


def package_graph() -> str:
    """The picture of this repository."""
    return svg(read_table((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the picture in the place of its mark."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, f'<div class="package-graph">{package_graph()}</div>')


if __name__ == "__main__":
    print(package_graph())
