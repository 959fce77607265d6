"""How fast a model draws on this machine, learned from the pictures it has drawn."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.drawing.request import UNPATCHED, Request


@dataclass(frozen=True)
class _Times:
    """Seconds of one picture: what it takes whatever the number of steps, and each step."""

    fixed: float
    step: float


class Pace:
    """Seconds of pictures, per model, size and way of drawing.

    Nothing is known of a size before a picture of it was drawn: attention grows faster than the number of pixels, other
    layers do not. A way that has not been used yet should not take longer than exact attention.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, str], _Times] = {}

    def learn(self, request: Request, seconds: float, calls: Sequence[float]) -> None:
        """Learn from a whole picture; the device must be synchronised at its end.

        Args:
            request: as returned by `prepare`.
            seconds: of the picture.
            calls: seconds of every call of the denoiser, in order.
        """
        assert request.width is not None
        assert request.height is not None
        of_calls = min(statistics.median(calls) * len(calls), seconds) if calls else seconds
        times = _Times(seconds - of_calls, of_calls / request.steps)
        self._known[request.model, request.width, request.height, _way(request)] = times

    def seconds(self, request: Request, width: int, height: int) -> float | None:
        """Estimated seconds of one picture of this size; None until the model has drawn one."""
        ways = (_way(request), UNPATCHED)
        found = next((t for way in ways if (t := self._known.get((request.model, width, height, way)))), None)
        return None if found is None else found.fixed + found.step * request.steps


def _way(request: Request) -> str:
    """A name for everything that decides how attention is computed."""
    if request.method == UNPATCHED:
        return UNPATCHED
    own: Any = (request.method, request.preset, sorted(request.options.items()), request.recipe)
    return repr(own)
