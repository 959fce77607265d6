"""How fast a model draws on this machine, learned from the pictures it has drawn."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.drawing.request import UNPATCHED, Request

RUNS = 3  # of the same kind, whose median counts; of two the faster, since the very first is cold
REACH = 4.0  # factor in pixels from the sizes drawn, up to which times are extrapolated
STEEPEST = 2.0  # power of the pixels that attention grows with; nothing else grows faster


@dataclass(frozen=True)
class _Times:
    """Seconds of one picture: a fixed part, and a part per step."""

    fixed: float
    step: float


class Pace:
    """Seconds of pictures, per model, size and acceleration.

    A size that has not been drawn yet is extrapolated from two others, by how the time grew from one to the other. One
    size is not enough, since attention grows faster than the number of pixels and other layers do not. An acceleration
    that has not been used yet is assumed to take no longer than exact attention.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], dict[int, deque[_Times]]] = {}  # model, way -> pixels -> latest runs

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
        sizes = self._known.setdefault((request.model, _way(request)), {})
        runs = sizes.setdefault(request.width * request.height, deque(maxlen=RUNS))
        runs.append(_Times(seconds - of_calls, of_calls / request.steps))

    def seconds(self, request: Request, width: int, height: int) -> float | None:
        """Estimated seconds of one picture of this size; None until the model has drawn one, or others of two sizes."""
        for way in (_way(request), UNPATCHED):
            found = _at(self._known.get((request.model, way), {}), width * height)
            if found is not None:
                return found.fixed + found.step * request.steps
        return None


def _at(sizes: Mapping[int, Sequence[_Times]], pixels: int) -> _Times | None:
    """The times of a picture of so many pixels, scaled from the two nearest sizes if none of its own was drawn."""
    if pixels in sizes:
        return _middle(sizes[pixels])
    nearest = sorted(sizes, key=lambda known: abs(math.log(known / pixels)))[:2]
    if len(nearest) < 2 or not 1 / REACH <= pixels / nearest[0] <= REACH:
        return None
    first, second = (_middle(sizes[known]) for known in nearest)
    apart, far = math.log(nearest[1] / nearest[0]), pixels / nearest[0]
    return _Times(_scaled(first.fixed, second.fixed, apart, far), _scaled(first.step, second.step, apart, far))


def _middle(runs: Sequence[_Times]) -> _Times:
    return _Times(*(statistics.median_low(getattr(run, name) for run in runs) for name in ("fixed", "step")))


def _scaled(first: float, second: float, apart: float, far: float) -> float:
    """A time of the first size, at `far` times its pixels, by the power with which it grew to the second.

    Args:
        apart: logarithm of the second size's pixels over the first's.
    """
    if min(first, second) <= 0:
        return first * far
    power = math.log(second / first) / apart
    return first * far ** min(max(power, 0.0), STEEPEST)


def _way(request: Request) -> str:
    """A name for everything that decides how attention is computed."""
    if request.method == UNPATCHED:
        return UNPATCHED
    named = (None, None) if request.recipe is not None else (request.method, request.preset)  # filled in by `prepare`
    own: Any = (*named, sorted(request.options.items()), request.recipe)
    return repr(own)
