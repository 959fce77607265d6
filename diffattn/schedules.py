"""Schedules: the options of a method by noise level or by the change of the latents. Pure Python.

The noise level is u = σ/(1 + σ), σ the ratio of noise to signal amplitude: 1 is pure noise, 0 is data. Of flow matching
it is the time, from 1 to 0: the same on the linear path, and within 0.05 of it on a DiT's path "gvp". Sampling goes
from high to low.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from reprlib import repr as short
from typing import Any, Protocol, Self, runtime_checkable

EXACT = "exact"

MAX_PHASES = 64  # of a schedule: more than a run of a hundred steps needs

Options = Mapping[str, Any] | None
"""Options that override the method's for one phase; None is exact attention."""


@runtime_checkable
class Schedule(Protocol):
    """Phases over one run."""

    @property
    def phases(self) -> Sequence[Options]:
        """The options of every phase."""
        ...

    def start(self, batch: int) -> None:
        """Begin a new run with `batch` samples."""
        ...

    def observe(self, latents: Any, noise_levels: Sequence[float]) -> None:
        """Called before each denoiser call with its noisy input and the noise level, one or one per sample."""
        ...

    def phase(self) -> int | tuple[int, ...]:
        """The phase of the call observed last, for the batch or for every sample."""
        ...

    def reachable(self, noise_levels: Iterable[float]) -> set[int]:
        """The phases that calls at these noise levels can be in."""
        ...


def needs_level(schedule: Schedule) -> bool:
    """Whether the phase depends on the noise level; True for a schedule without the attribute `needs_level`."""
    return len(schedule.phases) > 1 and bool(getattr(schedule, "needs_level", True))


class NoiseSchedule:
    """Options by noise level, given as {lower bound: options}; the highest bound not above the level applies.

        NoiseSchedule({0.7: {"num_agents": 16}, 0.3: {"num_agents": 64}, 0.0: "exact"})

    runs 16 agents from pure noise down to 0.7, 64 down to 0.3, and exact attention below.

    Raises:
        ValueError: no bound of 0, a bound outside [0, 1), an entry that is neither options nor "exact", or more than
            `MAX_PHASES` of them.
    """

    def __init__(self, entries: Mapping[Any, Mapping[str, Any] | str]) -> None:
        _check_number(entries)
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
        """The entries as JSON types, accepted by the constructor."""
        return {str(b): EXACT if p is None else dict(p) for b, p in zip(self.bounds, self.phases, strict=True)}


class LatentChangeSchedule:
    """Options by how much the latents still change: step-wise dynamic mediators (Pu et al., ECCV 2024).

        LatentChangeSchedule([{"num_mediators": 4}, {"num_mediators": 16}, {"num_mediators": 64}], [0.8, 0.45])

    A run begins with the first entry. Δ_k is the mean change from state x_{k-1} to x_k, Δ₀ the mean of the first few of
    them; at the first later Δ_k < r_i·Δ₀ the run moves on to entry i + 1, and never back. As published, the states are
    the noisy inputs of the denoiser, one per step, without the initial noise, so the first change is known at the third
    step. Calls at the same noise level as the one before (the second evaluation of Heun's method) belong to the same
    step, and the later state counts. Measuring the change waits for the device, once per call; inputs in half precision
    round small changes.

    Args:
        entries: options or "exact", one more than `thresholds`.
        thresholds: r_1 >= r_2 >= ... above 0, as shares of Δ₀.
        first: how many changes Δ₀ averages; the phase cannot change during these.
        distance: "l1", mean |x_k - x_{k-1}|, or "l2", mean (x_k - x_{k-1})².
        per_sample: decide for every sample by its own change; otherwise the mean over the batch decides for all.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    KIND = "latent_change"
    needs_level = False  # noise levels only distinguish the calls of one step from those of the next

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any] | str],
        thresholds: Sequence[float],
        *,
        first: int = 3,
        distance: str = "l1",
        per_sample: bool = False,
    ) -> None:
        if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
            raise ValueError(f"entries must be a list of options or {EXACT!r}, got {short(entries)}")
        _check_number(entries)
        self.phases: tuple[Options, ...] = tuple(_options(entry) for entry in entries)
        self.thresholds: tuple[float, ...] = _thresholds(thresholds, len(self.phases))
        if not isinstance(first, int) or isinstance(first, bool) or first < 1:
            raise ValueError(f"first must be a whole number, 1 or more, got {first!r}")
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance must be 'l1' or 'l2', got {distance!r}")
        if not isinstance(per_sample, bool):
            raise ValueError(f"per_sample must be True or False, got {per_sample!r}")
        self.first, self.distance, self.per_sample = first, distance, per_sample
        self.start(1)

    def start(self, batch: int) -> None:
        self._step: list[float] | None = None  # noise levels of the current step
        self._steps = 0  # started so far
        self._before: Any = None  # the state before that step
        self._state: Any = None  # the state of that step
        self._changes: list[list[float]] = []  # of the previous steps, for the batch or every sample
        self._change: list[float] | None = None  # of the current step
        self._current: int | tuple[int, ...] = 0

    @property
    def change(self) -> float | list[float] | None:
        """Δ_k of the call observed last, for the batch or every sample; None before there is one."""
        return self._change if self.per_sample or self._change is None else self._change[0]

    def observe(self, latents: Any, noise_levels: Sequence[float]) -> None:
        """`latents` [B, ...]: a batch that grows by whole copies of itself, as for guidance, has the same samples."""
        if self._state is not None and self._state.shape[1:] != latents.shape[1:]:
            self.start(len(latents))
        if self._step != list(noise_levels):
            self._begin_step(list(noise_levels))
        if self._steps > 1:
            self._state = latents.detach().clone()  # a scheduler may later change it in place
        if self._before is not None:
            self._change = self._measure(latents.detach())
            samples = range(len(self._change))
            changes = [*self._changes, self._change]
            phases = tuple(self._decide([c[i % len(c)] for c in changes]) for i in samples)
            self._current = phases[0] if len(set(phases)) == 1 else phases

    def _begin_step(self, noise_levels: list[float]) -> None:
        if self._change is not None:
            self._changes.append(self._change)
        self._before, self._step = self._state, noise_levels
        self._steps += 1

    def _measure(self, latents: Any) -> list[float]:
        """The change over the state before, for the batch or every sample."""
        before, batch = self._before, len(latents)
        if len(before) != batch:
            before = before[[i % len(before) for i in range(batch)]]
        difference = latents.float() - before.float()
        distances = difference.abs() if self.distance == "l1" else difference.square()
        return distances.flatten(1).mean(1).tolist() if self.per_sample else [distances.mean().item()]

    def _decide(self, changes: Sequence[float]) -> int:
        """The phase after these changes of one sample, or of the batch."""
        reference, phase = sum(changes[: self.first]) / self.first, 0
        for change in changes[self.first :]:
            while phase < len(self.thresholds) and change < self.thresholds[phase] * reference:
                phase += 1
        return phase

    def phase(self) -> int | tuple[int, ...]:
        return self._current

    def reachable(self, noise_levels: Iterable[float]) -> set[int]:
        return set(range(len(self.phases)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, accepted by `from_dict` and a recipe's "schedule"."""
        return {
            "kind": self.KIND,
            "entries": [EXACT if p is None else dict(p) for p in self.phases],
            "thresholds": list(self.thresholds),
            "first": self.first,
            "distance": self.distance,
            "per_sample": self.per_sample,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The schedule that `to_dict` wrote; raises `ValueError` for a missing or unknown key."""
        given = {key: value for key, value in values.items() if key != "kind"}
        needed, allowed = ("entries", "thresholds"), ("entries", "thresholds", "first", "distance", "per_sample")
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f"a schedule of kind {cls.KIND!r} needs {', '.join(missing)}")
        if unknown := sorted(set(map(str, given)) - set(allowed)):
            raise ValueError(
                f"unknown key {', '.join(unknown)} of a schedule of kind {cls.KIND!r}; allowed: {', '.join(allowed)}"
            )
        return cls(**given)


def read_schedule(values: Mapping[Any, Any]) -> NoiseSchedule | LatentChangeSchedule:
    """A schedule from JSON types: the entries of a `NoiseSchedule`, or {"kind": "latent_change", ...}.

    Raises:
        ValueError: an unknown kind, or invalid fields for it.
    """
    if "kind" not in values:
        return NoiseSchedule(values)
    if values["kind"] != LatentChangeSchedule.KIND:
        raise ValueError(f"kind of schedule must be {LatentChangeSchedule.KIND!r}, got {values['kind']!r}")
    return LatentChangeSchedule.from_dict(values)


def constant() -> NoiseSchedule:
    """The same options at every noise level."""
    return NoiseSchedule({0.0: {}})


def _check_number(entries: Sequence[Any] | Mapping[Any, Any]) -> None:
    if len(entries) > MAX_PHASES:
        raise ValueError(f"a schedule has at most {MAX_PHASES} entries, got {len(entries)}")


def _bound(key: float | str) -> float:
    try:
        bound = float(key)
    except (TypeError, ValueError):
        raise ValueError(f"a schedule's bounds must be noise levels from 0 to 1, got {short(key)}") from None
    if not (isfinite(bound) and 0 <= bound < 1):
        raise ValueError(f"a schedule's bounds must be noise levels of at least 0 and below 1, got {short(key)}")
    return bound


def _options(entry: Mapping[str, Any] | str) -> Options:
    if isinstance(entry, Mapping):
        return dict(entry)
    if entry == EXACT:
        return None
    raise ValueError(f"a schedule's entries must be options or {EXACT!r}, got {short(entry)}")


def _thresholds(values: Sequence[float], num_phases: int) -> tuple[float, ...]:
    numbers = not isinstance(values, str) and isinstance(values, Sequence)
    numbers = numbers and all(isinstance(r, int | float) and not isinstance(r, bool) for r in values)
    if not numbers or not all(isfinite(r) and r > 0 for r in values) or list(values) != sorted(values, reverse=True):
        raise ValueError(f"thresholds must be falling numbers above 0, got {short(values)}")
    if num_phases != len(values) + 1 or not values:
        raise ValueError(
            f"a schedule needs at least one threshold and one more entry than thresholds, got {num_phases} entries "
            f"and {len(values)} thresholds"
        )
    return tuple(float(r) for r in values)
