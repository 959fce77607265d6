"""Picture sizes to choose from."""

from diffattn.app.jobs import Worker

OWN_SIZE = "own"
SIZE_OF = f"(size) => !size || size === '{OWN_SIZE}' ? [null, null] : size.split('x').map(Number)"
"""JavaScript from a value of `sizes` to width and height, null for the model's own."""

LARGE = 512
"""Pixels a side from which attention takes enough of the time for acceleration to show."""

UNIT = 8  # pixels


def sizes(worker: Worker, model: str) -> list[tuple[str, str]]:
    """(label, value) of the model's own size, and of larger ones within the limits."""
    found = worker.models.describe(model) if model else None
    own = found.size if found else None
    if found is None or own is None:
        return [("the model's own", OWN_SIZE)]
    offered = [(f"{own_sizes(own)} (the model's own)", OWN_SIZE)]
    if found.only_its_size or found.draws_classes:
        return offered
    sides = {2 * max(own), 3 * max(own) // 2, LARGE} if max(own) < LARGE else {3 * max(own) // 2}
    fitting = sorted(side for side in sides if max(own) < side <= worker.limits.side and side % (8 * UNIT) == 0)
    return offered + [(f"{side}×{side}", f"{side}x{side}") for side in fitting]


def own_sizes(size: tuple[int, int]) -> str:
    """ "256×256" """
    return f"{size[0]}×{size[1]}"


def size_value(worker: Worker, model: str, width: float | None, height: float | None) -> str | None:
    """The value of `sizes` for a width and a height; None for a size that is not among them."""
    if (width, height) in ((None, None), worker.models.describe(model).size):
        return OWN_SIZE
    value = f"{width:.0f}x{height:.0f}" if width and height else None
    return value if value in [value for _, value in sizes(worker, model)] else None


def small_gain(worker: Worker, model: str, width: int, height: int) -> str:
    """The advice for a picture that is too small to gain much; empty if it is not, or nothing larger is offered."""
    own = worker.models.describe(model).size or (0, 0)
    larger = max(own) >= LARGE or f"{LARGE}x{LARGE}" in [value for _, value in sizes(worker, model)]
    return f" Small picture, small gain: try {LARGE}." if larger and 0 < max(width, height) < LARGE else ""
