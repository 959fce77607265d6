"""Schedules: which options of a method apply at which noise level. Pure Python.

The noise level is u = σ/(1 + σ), σ the ratio of noise to signal amplitude: 1 is pure noise, 0 is data, and it
equals the time of flow matching. Sampling goes from high to low.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, Protocol, runtime_checkable

EXACT = "exact"

Options = Mapping[str, Any] | None
"""Options laid over those of the method for one phase; None is exact attention."""


@runtime_checkable
class Schedule(Protocol):
    """Phases over one run."""

    @property
    def phases(self) -> Sequence[Options]:
        """The options of every phase."""
        ...

    def start(self, batch: int) -> None:
        """A new run begins with `batch` samples."""
        ...

    def observe(self, latents: Any, noise_levels: Sequence[float]) -> None:
        """Before each call of the denoiser: its noisy input and the noise level, one or one per sample."""
        ...

    def phase(self) -> int | tuple[int, ...]:
        """The phase of the call observed last, for the batch or for every sample."""
        ...

    def reachable(self, noise_levels: Iterable[float]) -> set[int]:
        """The phases that calls at these noise levels can be in."""
        ...


class NoiseSchedule:
    """Options by noise level, given as {lower bound: options}; the highest bound not above the level applies.

        NoiseSchedule({0.7: {"num_agents": 16}, 0.3: {"num_agents": 64}, 0.0: "exact"})

    runs 16 agents from pure noise down to 0.7, 64 down to 0.3, and exact attention below.

    Raises:
        ValueError: no bound of 0, a bound outside [0, 1), or an entry that is neither options nor "exact".
    """

    def __init__(self, entries: Mapping[float, Mapping[str, Any] | str]) -> None:
        bounds = {_bound(key): value for key, value in entries.items()}
        if 0.0 not in bounds:
            raise ValueError(f"a schedule needs an entry at 0.0, got bounds {sorted(bounds)}")
        self.bounds: tuple[float, ...] = tuple(sorted(bounds, reverse=True))
        self.phases: tuple[Options, ...] = tuple(_options(bounds[b]) for b in self.bounds)
        self._current: int | tuple[int, ...] = 0

    def phase_at(self, noise_level: float) -> int:
        """The phase at one noise level in [0, 1]."""
        return next((i for i, b in enumerate(self.bounds) if noise_level >= b), len(self.bounds) - 1)

    def start(self, batch: int) -> None:
        self._current = 0

    def observe(self, latents: Any, noise_levels: Sequence[float]) -> None:
        phases = tuple(self.phase_at(u) for u in noise_levels)
        self._current = phases[0] if len(set(phases)) == 1 else phases

    def phase(self) -> int | tuple[int, ...]:
        return self._current

    def reachable(self, noise_levels: Iterable[float]) -> set[int]:
        return {self.phase_at(u) for u in noise_levels}

    def to_dict(self) -> dict[str, Any]:
        """The entries as JSON can hold them; the constructor reads them back."""
        return {str(b): EXACT if p is None else dict(p) for b, p in zip(self.bounds, self.phases, strict=True)}


def constant() -> NoiseSchedule:
    """The same options at every noise level."""
    return NoiseSchedule({0.0: {}})


def _bound(key: float | str) -> float:
    try:
        bound = float(key)
    except (TypeError, ValueError):
        raise ValueError(f"a schedule's bounds are noise levels from 0 to 1, got {key!r}") from None
    if not (isfinite(bound) and 0 <= bound < 1):
        raise ValueError(f"a schedule's bounds are noise levels of at least 0 and below 1, got {key!r}")
    return bound


def _options(entry: Mapping[str, Any] | str) -> Options:
    if isinstance(entry, Mapping):
        return dict(entry)
    if entry == EXACT:
        return None
    raise ValueError(f"a schedule's entries are options or {EXACT!r}, got {entry!r}")
