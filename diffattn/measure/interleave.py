"""Fair timing: variants take turns, round after round, and every ratio compares times of one round.

Machines drift and share their load, but the times within one round are taken under the same conditions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Self

import torch

from diffattn.measure.clock import mark, seconds_between, synchronize

Round = Mapping[str, float]
"""Seconds of every variant in one round."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of at least one value; quartiles are interpolated between values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q25, _, q75 = quantiles(values, n=4, method="inclusive")
        return cls(median(values), q25, q75)

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "iqr": [self.q25, self.q75]}


@dataclass(frozen=True)
class Timings:
    """What `interleave` measured.

    Attributes:
        reference: the variant the ratios refer to.
        rounds: every finished round, in seconds.
        peak_mib: most memory allocated during a call, in MiB; CUDA only.
    """

    reference: str
    rounds: tuple[Round, ...]
    peak_mib: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of([r[name] for r in self.rounds])

    def time_ratio(self, name: str) -> Spread:
        """Time over that of the reference in the same round; below 1 is faster."""
        return Spread.of([r[name] / r[self.reference] for r in self.rounds])

    def speedup(self, name: str) -> float:
        """1 / median time ratio; above 1 is faster."""
        return 1 / self.time_ratio(name).median

    def share_of_saving(self, name: str, floor: str) -> float | None:
        """The share of the floor's saving over the reference that `name` achieves: (t_ref - t) / (t_ref - t_floor).

        Computed from median time ratios as (1 - ratio) / (1 - floor's ratio). None where the floor saves nothing
        measurable (the upper quartile of its time ratio is 1 or more).
        """
        ratio = self.time_ratio(floor)
        return (1 - self.time_ratio(name).median) / (1 - ratio.median) if ratio.q75 < 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Every figure and every single time, as JSON types."""
        return {
            "reference": self.reference,
            "rounds": len(self.rounds),
            "variants": {name: self._variant(name) for name in (self.rounds[0] if self.rounds else ())},
        }

    def _variant(self, name: str) -> dict[str, Any]:
        figures = {
            "seconds": self.seconds(name).to_dict(),
            "time_ratio": self.time_ratio(name).to_dict(),
            "speedup": self.speedup(name),
            "seconds_per_round": [r[name] for r in self.rounds],
        }
        return figures | ({"peak_mib": self.peak_mib[name]} if name in self.peak_mib else {})


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    *,
    around: Callable[[str], AbstractContextManager[Any]] | None = None,
    finished: Sequence[Round] = (),
    deadline: float | None = None,
    on_round: Callable[[Timings], None] | None = None,
) -> Timings:
    """Time every variant once per round, in an order that rotates from round to round.

    An interrupt loses only the current round: `on_round` has been called with all finished ones.

    Args:
        variants: name -> what to time, called without arguments. Time ratios refer to the first one.
        rounds: number of rounds, those in `finished` included.
        warmup: calls of every variant before the first round.
        device: where the work runs; timed by its events on CUDA, elsewhere the clock waits for it.
        around: makes a context, entered before and left after every call of the named variant, not timed.
        finished: rounds of an earlier measurement to continue.
        deadline: no round begins that would end after this time (`time.monotonic`), the first one excepted.
        on_round: called after every round with all rounds so far.

    Raises:
        ValueError: no variants, fewer than one round, or finished rounds of other variants.
    """
    names = list(variants)
    _check(names, rounds, finished)
    around = around or (lambda name: nullcontext())
    done, peaks = list(finished), dict[str, float]()
    if len(done) < rounds:
        for name in names * warmup:
            _timed(variants[name], around(name), device)
    longest = 0.0
    while len(done) < rounds:
        began = time.monotonic()
        if deadline is not None and done and began + longest > deadline:
            break
        seconds: dict[str, float] = {}
        for name in rotated(names, len(done)):
            seconds[name], peak = _timed(variants[name], around(name), device)
            if peak is not None:
                peaks[name] = max(peak, peaks.get(name, 0.0))
        done.append({name: seconds[name] for name in names})
        longest = max(longest, time.monotonic() - began)
        if on_round is not None:
            on_round(Timings(names[0], tuple(done), dict(peaks)))
    return Timings(names[0], tuple(done), peaks)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`, counted from 0: each name comes first in turn, so that none profits from its place.

    Args:
        names: of the variants, at least one.
        number: of the round.
    """
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def _timed(
    call: Callable[[], Any], context: AbstractContextManager[Any], device: torch.device | str
) -> tuple[float, float | None]:
    """Seconds of one call, and its peak memory in MiB (CUDA)."""
    on_cuda = torch.device(device).type == "cuda"
    with context:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        begin = mark(device)
        call()
        end = mark(device)
        synchronize(device)
    return seconds_between(begin, end), torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else None


def _check(names: Sequence[str], rounds: int, finished: Sequence[Round]) -> None:
    if not names:
        raise ValueError("there is nothing to time: no variants")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    for other in finished:
        if set(other) != set(names):
            raise ValueError(f"finished rounds have the variants {', '.join(other)}, not {', '.join(names)}")
