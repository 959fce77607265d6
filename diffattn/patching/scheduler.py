"""Finds the scheduler that made a denoiser's time step: that of the running pipeline or sampling loop."""

from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffattn.architectures.denoisers import Pipeline, uncompiled
from diffattn.architectures.run_state import RunState
from diffattn.noise_level import Convention, NoiseLevels, Reading, values_of
from diffattn.patching.callers import callers, schedulers_in


class Found(NamedTuple):
    """The scheduler of a denoiser call."""

    scheduler: Any  # None if none is found
    is_sure: bool  # whether it certainly made the time step
    runs: bool = False  # whether the callers are in a run over its time steps


class SchedulerInUse:
    """Reads the time steps of one denoiser call; a `TimeReader`.

    A scheduler's time step is a view of its `timesteps`, which identifies it at no cost in every call but the first of
    a run. Otherwise, as where a pipeline passes t/1000, the callers are searched: for the scheduler that the time step
    is a view of, then for a pipeline that holds the denoiser, then for a scheduler with this time step in its run. The
    patched pipeline's own scheduler is the last resort, for manual calls, and only for numbers that can be its time
    steps. A time step that was computed from a view still belongs to the run if the callers are in one.
    """

    def __init__(self, state: RunState, model: nn.Module, own: Any) -> None:
        """`state`: remembers the scheduler between calls; `own`: of the patched pipeline, if it has one."""
        self._state, self._model, self._own = state, uncompiled(model), own

    def read(self, timestep: Tensor | float, training: Convention | None = None, rounding: float = 0.0) -> Reading:
        """See `TimeReader`."""
        last = self._state.noise_levels
        if last is not None and last.made(timestep):
            return last.read(timestep, training)
        found = self._find(timestep, rounding)
        if last is None or last.scheduler is not found.scheduler:
            last = self._state.schedulers.get(id(found.scheduler)) or NoiseLevels(found.scheduler)
            self._state.noise_levels = last
        if found.runs and (position := self._position(last, values_of(timestep), rounding)) is not None:
            return last.at(position)
        reading = last.read(timestep, training, rounding)
        if found.is_sure or found.scheduler is None:
            return reading
        return reading._replace(known=reading.known and last.covers(values_of(timestep)))

    def _find(self, timestep: Tensor | float, rounding: float) -> Found:
        if self._own is not None and NoiseLevels(self._own).made(timestep):
            return Found(self._own, True)
        seen = self._levels_of(s for frame in callers() for s in schedulers_in(frame))
        for levels in seen:
            if levels.made(timestep):
                return Found(levels.scheduler, True)
        pipe = next((p for frame in callers() if (p := self._pipeline(frame)) is not None), None)
        if pipe is not None:
            scheduler = getattr(pipe, "scheduler", None)
            return Found(scheduler, True, scheduler is not None)
        values = values_of(timestep)
        for levels in seen:
            if levels.contains(values, rounding):
                return Found(levels.scheduler, True, any(True for _ in _steps_in_callers(levels)))
        return Found(self._own, False)

    @staticmethod
    def _position(levels: NoiseLevels, values: Sequence[float], rounding: float) -> int | None:
        """The place of a time step in a run: that of a caller's variable, such as `t`, where it agrees, else that of
        the nearest one, since rounded numbers may be near to several; None where samples differ."""
        if len(values) > 1:
            return None
        near = (i for i in _steps_in_callers(levels) if levels.is_near(i, values[0], rounding))
        return next(near, levels.nearest(values[0], rounding))

    def _levels_of(self, schedulers: Iterable[Any]) -> list[NoiseLevels]:
        """Those of the pipeline's own scheduler, and then of the given ones, nearest first.

        They are kept until the next search, so that a run's time steps are not converted anew in each of its calls.
        """
        before = self._state.schedulers
        kept = {id(s): before.get(id(s)) or NoiseLevels(s) for s in (self._own, *schedulers) if s is not None}
        self._state.schedulers = kept
        return list(kept.values())

    def _pipeline(self, frame: FrameType) -> Pipeline | None:
        """The pipeline whose method a frame is, if it holds the denoiser."""
        caller = frame.f_locals.get("self")
        if not issubclass(type(caller), Pipeline):
            return None
        return caller if any(self._is_held(part) for part in vars(caller).values()) else None

    def _is_held(self, part: Any) -> bool:
        if not isinstance(part, nn.Module):
            return False
        nets: Sequence[Any] = getattr(part, "nets", ())  # several ControlNets in one
        return any(uncompiled(net) is self._model for net in (part, *nets) if isinstance(net, nn.Module))


def _steps_in_callers(levels: NoiseLevels) -> Iterator[int]:
    """The places of those of a scheduler's time steps that callers have as a variable."""
    for frame in callers():
        for value in frame.f_locals.values():
            if (position := levels.position_of(value)) is not None:
                yield position
