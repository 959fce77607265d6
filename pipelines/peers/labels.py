"""Names beside points, without overlaps."""

from collections.abc import Mapping
from typing import Any

SIZE = 8  # points
DISTANCES = (7, 18, 30, 44, 60, 78)
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))

Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def place_labels(axis: Any, points: Mapping[str, tuple[float, float, str]]) -> None:
    """Writes the names of points (x, y, colour) into the nearest free place, with a line to points that are far."""
    axis.figure.draw_without_rendering()  # settles the layout, and with it where points are
    scale = 72 / axis.figure.dpi
    frame = [scale * v for v in axis.get_window_extent().extents]
    places = {name: axis.transData.transform((x, y)) * scale for name, (x, y, _) in points.items()}
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for name in sorted(points, key=lambda name: -places[name][1]):
        x, y, colour = points[name]
        dx, dy, box = _free(places[name], name, taken, frame)
        taken.append(box)
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5} if max(abs(dx), abs(dy)) > 10 else None
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        axis.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=SIZE, color=colour, ha=side,
                      va="center", arrowprops=arrow)  # fmt: skip


def _free(place: Any, name: str, taken: list[Box], frame: list[float]) -> tuple[float, float, Box]:
    """The first offset whose text meets nothing and stays inside the frame, else the last one tried."""
    dx = dy = 0.0
    box: Box = (0, 0, 0, 0)
    for distance in DISTANCES:
        for right, up in DIRECTIONS:
            dx, dy = distance * right, distance * up
            box = _box(place[0] + dx, place[1] + dy, name, right)
            inside = box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and not any(_meet(box, other) for other in taken):
                return dx, dy, box
    return dx, dy, box


def _box(x: float, y: float, name: str, right: int) -> Box:
    width, height = 0.6 * SIZE * len(name), 1.3 * SIZE
    left = x - width * {1: 0.0, 0: 0.5, -1: 1.0}[right]
    return left, y - height / 2, left + width, y + height / 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
