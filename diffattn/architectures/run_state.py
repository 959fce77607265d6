"""The run under way, per thread, and the count of what happened: what the processors of one patch share."""

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from diffattn.schedules import Schedule

ACCELERATED = "accelerated"
"""What is counted for a call that was accelerated; anything else is the reason why it was not."""

EXACT_HEADS = "heads that ran exact in accelerated calls"
"""What is counted beside calls: heads of all samples."""

LONGEST_TRACE = 10_000
"""Calls that a trace holds: of a model that is called by hand at one noise level for ever, the last ones."""


@dataclass(frozen=True)
class DenoiserCall:
    """What a processor needs to know of the denoiser call it is part of."""

    phase: int | tuple[int, ...]  # of the schedule, for the batch or one per sample
    grids: Mapping[int, tuple[int, int]]  # number of tokens -> (rows, columns), at every level
    compiled: bool  # part of the denoiser is compiled: the hook counts instead of the processors


class Latest:
    """The call that began last in any thread: what autograd's own threads recompute."""

    call: DenoiserCall | None = None


class RunState(threading.local):
    """The run under way, one per thread. Written outside the denoiser, before each of its calls; read inside.

    Attributes:
        call: the call under way.
        schedule: this run's own copy of the schedule.
        last_level: highest noise level of the call before; a rise begins a new run.
        scheduler_run: which setting of the scheduler's time steps that call was in, None if unknown.
        trace: what happened in every call of this run, as JSON types.
    """

    call: DenoiserCall | None = None
    schedule: Schedule | None = None
    last_level: float = -1.0
    scheduler_run: int | None = None

    def __init__(self, latest: Latest) -> None:
        """Called once per thread, with the same `latest`."""
        self.latest = latest
        self.trace: deque[dict[str, Any]] = deque(maxlen=LONGEST_TRACE)

    def begin(self, call: DenoiserCall) -> None:
        """A call of the denoiser begins in this thread."""
        self.call = self.latest.call = call

    def current(self) -> DenoiserCall | None:
        """The call of this thread; in a thread that never called the denoiser, the latest of any."""
        return self.latest.call if self.call is None else self.call

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)(Latest())
        return new


class Tally:
    """Calls per layer and reason; threads may add at the same time."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, layer: str, reason: str, number: int = 1) -> None:
        with self._lock:
            self._counts[layer, reason] += number

    def of(self, layer: str) -> dict[str, int]:
        """Calls of one layer by reason, `ACCELERATED` among them."""
        with self._lock:
            return {reason: n for (name, reason), n in self._counts.items() if name == layer}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)()
        with self._lock:
            new._counts.update(self._counts)
        return new
