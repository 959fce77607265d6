"""The state shared by the processors of one patch: the current run, per thread, and the call counts."""

import copy
import pickle
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch

from diffattn.methods.base import EXACT_SHARE, Grid
from diffattn.noise_level import NoiseLevels, Reading
from diffattn.schedules import Schedule

ACCELERATED = "accelerated"
"""The count of accelerated calls; any other key is the reason why calls were not accelerated."""

HEADS = "heads that ran exact in accelerated calls"
"""A count besides calls: heads over all samples."""

OUTSIDE = "called outside a call of the denoiser, for instance by model.forward"
"""The reason for a layer that ran outside any call of the denoiser."""

EXACT_PHASE = -1
"""The phase of a call whose noise level is needed but unknown: exact attention."""

MOST_PLACES = 256
"""Calls at one noise level that are told apart; a pipeline with so many draws one picture after another at it."""

LONGEST_TRACE = 10_000
"""Maximum calls in a trace; a model that is called at one noise level forever keeps the last ones."""


class NotPickled:
    """Base of the parts of a patched model, which can be deep-copied with it but not pickled."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise pickle.PicklingError(
            "a model patched by diffattn cannot be pickled, saved whole with torch.save or sent to another process: "
            "call diffattn.unpatch first, and diffattn.patch where it is loaded (its state_dict can be saved as usual)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = object.__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(new, name, copy.deepcopy(value, memo))
        return new


@dataclass(frozen=True)
class DenoiserCall:
    """What a processor needs to know about the current denoiser call."""

    phase: int | tuple[int, ...]  # of the schedule, for the batch or one per sample; or EXACT_PHASE
    grids: Sequence[Grid]  # of the tokens, by level
    compiled: bool  # part of the denoiser is compiled: the hook counts instead of the processors
    references: tuple[Grid, ...] = ()  # of reference pictures, at every level
    context_first: bool | None = None  # see `Size`
    same_mask: bool = False  # see `Size`
    place: int = -1
    """Index among the calls at its noise level, such as one per side of guidance; -1: in no known run, so the next call
    may be about another picture."""
    contexts: tuple[int, ...] | None = None  # see `Size`
    exact: str | None = None  # see `Size`
    looks: bool = False  # runs uncompiled, though `compiled`, and only to find the heads that compiled code runs exact


class Latest:
    """The most recent call of any thread, which autograd's own threads recompute."""

    call: DenoiserCall | None = None


class RunState(threading.local):
    """The current run of each thread. Written outside the denoiser, before and after its calls; read inside.

    Attributes:
        call: the current or the last call.
        inside: whether a call is in progress.
        bypassed: whether the denoiser's `forward` has since been entered without its hooks.
        schedule: this run's own copy of the schedule.
        noise_levels: reads the time steps of the scheduler in use.
        schedulers: the same for every scheduler that the last search for it met, by the scheduler's id.
        last_level: highest noise level of the call before.
        place: index of the last call whose run is known among those at its noise level.
        scheduler_run: which setting of the scheduler's time steps the run is in, None if unknown.
        last_to_come: how many of them were to come when this was last known.
        memory: (layer, phase, place of the call, or of a group of its samples; see `memory_of`) -> what its method
            keeps for later calls of the run.
        turns: the same keys -> how often they were asked for in the current call.
        decided: kinds of calls -> what was decided (`decisions.Choice`); fixed for the run from the first such call on.
        settled: calls of a layer, see `MethodProcessor._settling` -> why they run exact for the rest of the run.
        timing: seconds spent in this run on timing kinds of calls.
        expected: what is known about the calls of a compiled denoiser whose heads are looked at.
        unchecked: phases of a run that has not yet been checked for acceleration, and what is known about its calls.
        trace: a record of every call of this run, as JSON types.
    """

    call: DenoiserCall | None = None
    inside: bool = False
    bypassed: bool = False
    schedule: Schedule | None = None
    noise_levels: NoiseLevels | None = None
    last_level: float = -1.0
    place: int = 0
    last_to_come: int = 0
    scheduler_run: object | None = None
    timing: float = 0.0
    expected: Any = None
    unchecked: tuple[Sequence[int], Any] | None = None

    def __init__(self, latest: Latest) -> None:
        """Called once per thread, with the same `latest`."""
        self.latest = latest
        self.schedulers: dict[int, NoiseLevels] = {}
        self.memory: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.turns: Counter[tuple[str, int, Any]] = Counter()
        self.decided: dict[str, bool | float] = {}
        self.settled: dict[tuple[Any, ...], str] = {}
        self.trace: deque[dict[str, Any]] = deque(maxlen=LONGEST_TRACE)

    def memory_of(self, key: tuple[str, int, Any]) -> dict[str, Any]:
        """The memory of a call of a layer; of the first, second, … one where the layer is called several times in one
        call of the denoiser, as by processors that attend for one sample after another."""
        turn = self.turns[key]
        self.turns[key] += 1
        return self.memory.setdefault((*key, turn) if turn else key, {})

    def taken(self, key: tuple[str, int, int]) -> list[dict[str, Any]]:
        """Take away the memories of a layer in a phase and at a place, also of groups of samples, that say which heads
        ran exact."""

        def matches(other: tuple[Any, ...]) -> bool:
            place = other[2][0] if isinstance(other[2], tuple) else other[2]
            return (*other[:2], place) == key

        return [m for k in list(self.memory) if matches(k) and EXACT_SHARE in (m := self.memory.pop(k))]

    def place_after(self, level: float) -> int:
        """The index of the next call among those at its noise level, and -1 from `MOST_PLACES` on; call this before
        setting `last_level`."""
        self.place = self.place + 1 if level == self.last_level else 0
        return self.place if self.place < MOST_PLACES else -1

    def is_left_by(self, reading: Reading) -> bool:
        """Whether a call is not in the run of the one before: it is in another run of a scheduler, or earlier in the
        same one (some samplers' own levels rise a little now and then), or its noise level is higher where that is all
        that is known."""
        if reading.run is None:
            return max(reading.levels) > self.last_level
        return reading.run is not self.scheduler_run or len(reading.to_come) > self.last_to_come

    def follow(self, reading: Reading, begins: bool) -> None:
        """Note where the run is; of a call whose place among the time steps is unknown, only the level."""
        self.last_level = max(reading.levels)
        if begins or reading.run is not None:
            self.scheduler_run, self.last_to_come = reading.run, len(reading.to_come)

    def forget(self) -> None:
        """Drop what belongs to the previous run."""
        self.trace.clear()
        self.memory.clear()
        self.decided.clear()
        self.settled.clear()
        self.timing, self.place = 0.0, 0

    def begin(self, call: DenoiserCall) -> None:
        """Begin a call of the denoiser in this thread."""
        self.call = self.latest.call = call
        self.inside, self.bypassed = True, False
        self.turns.clear()

    def current(self) -> DenoiserCall | None:
        """The call of this thread; in a thread that never called the denoiser, the latest of any.

        None outside of a call. With gradients, layers may run again after their call, in autograd's backward pass.
        """
        if self.bypassed or not (torch.is_grad_enabled() or self.inside):
            return None
        return self.latest.call if self.call is None else self.call

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        NotPickled.__reduce_ex__(self, protocol)  # type: ignore[arg-type]
        raise AssertionError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)(Latest())
        return new


class Tally(NotPickled):
    """Calls per layer and reason; threads may add at the same time."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, layer: str, reason: str, number: int = 1) -> None:
        """Count calls of a layer that were accelerated, or ran exact for the given reason."""
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
