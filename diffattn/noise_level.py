"""Converts a scheduler's time steps to noise levels, on the host and without synchronising the device.

The noise level is u = σ/(1 + σ), σ the ratio of noise to signal amplitude: 1 is pure noise, 0 is data. Of flow matching
it is the time, whatever the path, which a scheduler does not know.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import exp, inf, log, sqrt
from operator import mul
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


class Reading(NamedTuple):
    """The meaning of a time step."""

    levels: list[float]  # noise level in [0, 1]: one, or one per sample
    to_come: list[float]  # noise levels from here to the end of the run, as far as known
    run: object | None  # a new object whenever the scheduler's time steps are reset; None if unknown
    known: bool = True  # False: the levels only fall with the time step, and say nothing about the noise


class Convention(NamedTuple):
    """The convention of one kind of scheduler for its time steps."""

    level: Callable[[float], float]  # time step -> noise level
    covers: Callable[[float], bool]  # whether a number is a valid time step

    def __call__(self, timestep: float) -> float:
        """The noise level of a time step."""
        return self.level(timestep)


class TimeReader(Protocol):
    """Turns the time step of a denoiser call into noise levels."""

    def read(self, timestep: Tensor | float, training: Convention | None = None, rounding: float = 0.0) -> Reading:
        """The noise level of a time step, a number or a tensor [] or [B]: one, or one per sample if they differ.

        Args:
            timestep: of a scheduler.
            training: the denoiser's training schedule, used if no scheduler is known; None: Stable Diffusion's.
            rounding: how far the time step may be from the scheduler's own that it was computed from.
        """
        ...


class NoiseLevels:
    """Converts a denoiser's time steps to noise levels by the convention of one scheduler.

    A time step of the run that the scheduler was prepared for has the scheduler's own σ; any other is read by the
    scheduler's convention: an index into `alphas_cumprod`, flow matching's σ, or another function of σ (EDM,
    continuous Euler), which is interpolated between the scheduler's own pairs.
    A time step that is a view of the scheduler's `timesteps`, as in every pipeline's loop, is recognised by its
    place in memory, so that the device is not synchronised; those are copied to the host once per run.
    """

    def __init__(self, scheduler: Any = None) -> None:
        """`scheduler`: a diffusers scheduler; None interprets whole numbers by the denoiser's training schedule."""
        self.scheduler = scheduler
        self._convention: Convention | None = None
        self._steps: Tensor | None = None  # the run's time steps
        self._steps_version = 0
        self._steps_levels: list[float] = []
        self._times: list[float] = []
        self._place_of: dict[float, int] = {}
        self._run: object = None

    def read(self, timestep: Tensor | float, training: Convention | None = None, rounding: float = 0.0) -> Reading:
        """See `TimeReader`."""
        position = self.position_of(timestep)
        if position is not None:
            return self.at(position)
        values = values_of(timestep)
        if self.scheduler is None:
            convention = training or self._meaning()
            levels = [convention(t) for t in values]
            return Reading(levels, levels, None, all(convention.covers(t) for t in values))
        places = [self.nearest(t, rounding) for t in values]
        own = self._steps_levels
        levels = [self._level(t) if i is None else own[i] for i, t in zip(places, values, strict=True)]
        return Reading(levels, levels, None, self._known())

    def at(self, position: int) -> Reading:
        """The meaning of the time step at a place in the scheduler's run."""
        to_come = self._schedule()[position:]
        return Reading(to_come[:1], to_come, self._run, self._known())

    def made(self, timestep: Tensor | float) -> bool:
        """Whether a time step is a view of the scheduler's own."""
        return self.position_of(timestep) is not None

    def nearest(self, value: float, rounding: float = 0.0) -> int | None:
        """The place in the scheduler's run of the time step nearest to a number, if it is no further than `rounding`;
        the first of equal ones."""
        if not isinstance(getattr(self.scheduler, "timesteps", None), Tensor):
            return None
        self._schedule()
        if (found := self._place_of.get(value)) is not None or not rounding:
            return found
        found = min(range(len(self._times)), key=lambda i: abs(self._times[i] - value), default=None)
        return found if found is not None and abs(self._times[found] - value) <= rounding else None

    def contains(self, values: Sequence[float], rounding: float = 0.0) -> bool:
        """Whether all given time steps are among those of the scheduler's run, apart from rounding."""
        return all(self.nearest(t, rounding) is not None for t in values)

    def is_near(self, position: int, value: float, rounding: float) -> bool:
        """Whether the time step at a place in the scheduler's run is a number, apart from rounding."""
        self._schedule()
        return abs(self._times[position] - value) <= rounding

    def covers(self, values: Sequence[float]) -> bool:
        """Whether all given numbers are valid time steps of the scheduler."""
        return all(self._meaning().covers(t) for t in values)

    def position_of(self, timestep: Tensor | float) -> int | None:
        """Index into the scheduler's time steps of which `timestep` is a view, if it is one."""
        steps = getattr(self.scheduler, "timesteps", None)
        if not isinstance(timestep, Tensor) or not isinstance(steps, Tensor):
            return None
        if timestep.dtype != steps.dtype or not steps.is_contiguous():
            return None
        one_step = timestep.numel() == 1 or all(s == 0 for s in timestep.stride())
        if not one_step or timestep.untyped_storage().data_ptr() != steps.untyped_storage().data_ptr():
            return None
        position = int(timestep.storage_offset()) - int(steps.storage_offset())
        return position if 0 <= position < len(steps) else None

    def _schedule(self) -> list[float]:
        """Noise levels of the run's time steps, copied to the host once per run."""
        steps = self.scheduler.timesteps
        version = 0 if steps.is_inference() else steps._version
        if self._steps is not steps or self._steps_version != version:
            self._convention = None  # tables of σ belong to a run
            times = steps.tolist()
            self._steps_levels = _sigma_levels(self.scheduler, times) or [self._level(t) for t in times]
            self._times = times
            self._place_of = {t: i for i, t in reversed(list(enumerate(times)))}
            self._steps, self._steps_version = steps, version
            self._run = object()
        return self._steps_levels

    def _level(self, timestep: float) -> float:
        return self._meaning()(timestep)

    def _meaning(self) -> Convention:
        if self._convention is None:
            self._convention = _convention_of(self.scheduler)
        return self._convention

    def _known(self) -> bool:
        return self._meaning() is not UNKNOWN


def rounding_of(timestep: Tensor | float, largest: float = NUM_TRAIN_TIMESTEPS) -> float:
    """How far a time step may be from the one that it was computed from, in the dtype of its tensor and by a few
    operations; of a number, in float32.

    Args:
        timestep: the number or tensor that a denoiser was given.
        largest: of such time steps.
    """
    dtype = timestep.dtype if isinstance(timestep, Tensor) else torch.float32
    return 4 * largest * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def values_of(timestep: Tensor | float) -> list[float]:
    """A time step's value, or one per sample if they differ in a tensor [B]. Synchronises the tensor's device."""
    if not isinstance(timestep, Tensor):
        return [float(timestep)]
    values = timestep.detach().flatten()
    numbers = values[:1].tolist() if values.stride() == (0,) else values.tolist()
    return numbers[:1] if len(set(numbers)) == 1 else numbers


UNKNOWN = Convention(lambda t: min(max(t / NUM_TRAIN_TIMESTEPS, 0.0), 1.0), lambda t: False)
"""For a scheduler without any σ: levels that fall with the time step but are not noise levels."""


QUARTER_LOG_SIGMA = Convention(lambda t: level_of_sigma(exp(min(4 * t, 80.0))), lambda t: -3 < t < 3)
"""EDM's time steps, log(σ)/4."""


def _convention_of(scheduler: Any) -> Convention:
    """The convention of one scheduler for its time steps."""
    if scheduler is None:
        return _stable_diffusion()
    config = _config_of(scheduler)
    trained_on = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if _is_flow_matching(scheduler):
        inverted = bool(config.get("invert_sigmas"))  # σ and the time step then rise from noise to data
        level = lambda t: min(max(t / trained_on, 0.0), 1.0)  # noqa: E731
        return Convention(lambda t: 1 - level(t) if inverted else level(t), lambda t: 0 <= t <= trained_on)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    by_table = hasattr(scheduler, "precondition_noise") or config.get("timestep_type") == "continuous"
    if isinstance(alphas_cumprod, Tensor) and not by_table:
        return discrete(alphas_cumprod.tolist())
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and isinstance(timesteps, Tensor) and len(timesteps):
        return _table(timesteps.tolist(), sigmas.tolist(), config.get("sigma_data", 1.0))
    return UNKNOWN


FLOWS = ("FlowMatch", "FlowMap", "EulerAncestralRF", "Piflow", "MiniMaxH3")
"""Parts of the names of schedulers of flow matching, whose configurations do not say so."""


def _config_of(scheduler: Any) -> Mapping[str, Any]:
    """A scheduler's configuration; empty for one that has none as diffusers' have."""
    config = getattr(scheduler, "config", None)
    return config if isinstance(config, Mapping) else {}


def _is_flow_matching(scheduler: Any) -> bool:
    config = _config_of(scheduler)
    return (
        any(name in kind.__name__ for kind in type(scheduler).__mro__ for name in FLOWS)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _sigma_levels(scheduler: Any, times: Sequence[float]) -> list[float] | None:
    """Noise levels by the scheduler's own σ of its run's time steps; None if it has none that match."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not len(times) <= len(sigmas) <= len(times) + 2:
        return None
    values = sigmas.tolist()[: len(times)]
    for (s, r), (t, u) in zip(pairwise(values), pairwise(times), strict=True):
        if (s - r) * (t - u) < 0 or (s == r and t != u):
            return None  # not prepared yet, or with additional σ between the steps (KDPM2, DPM-Solver's SDE)
    if _is_flow_matching(scheduler):
        inverted = bool(_config_of(scheduler).get("invert_sigmas"))
        return [min(max(1 - s if inverted else s, 0.0), 1.0) for s in values]
    sigma_data = _config_of(scheduler).get("sigma_data", 1.0)
    return [level_of_sigma(s / sigma_data) for s in values]


def level_of_sigma(sigma: float) -> float:
    """u = σ/(1 + σ), also of an infinite σ."""
    return 1.0 if sigma == inf else max(sigma, 0.0) / (1 + max(sigma, 0.0))


def _stable_diffusion() -> Convention:
    return discrete(stable_diffusion_alphas_cumprod())


def stable_diffusion_alphas_cumprod() -> list[float]:
    """ᾱ of Stable Diffusion's training schedule: β scaled-linear from 0.00085 to 0.012 over 1,000 steps."""
    return _products(root**2 for root in _linear(sqrt(0.00085), sqrt(0.012)))


def dit_alphas_cumprod() -> list[float]:
    """ᾱ of DiT's training schedule: β linear from 0.0001 to 0.02 over 1,000 steps."""
    return _products(_linear(0.0001, 0.02))


def _linear(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (NUM_TRAIN_TIMESTEPS - 1) for i in range(NUM_TRAIN_TIMESTEPS)]


def _products(betas: Iterable[float]) -> list[float]:
    return list(accumulate((1 - beta for beta in betas), mul))


def discrete(alphas_cumprod: Sequence[float]) -> Convention:
    """Time steps index ᾱ: u = √(1-ᾱ) / (√ᾱ + √(1-ᾱ)); fractional ones are interpolated.

    Without a known scheduler, only a whole number counts as such a time step: a fraction may also be flow matching's
    1000σ, or a function of EDM's σ.
    """
    levels = [sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) for a in (min(max(a, 0.0), 1.0) for a in alphas_cumprod)]

    def level(timestep: float) -> float:
        t = min(max(0.0, timestep), len(levels) - 1.0)  # 0 for NaN
        i = min(int(t), len(levels) - 2)
        return levels[i] + (t - i) * (levels[i + 1] - levels[i])

    return Convention(level, lambda t: float(t).is_integer() and 0 <= t < len(levels))


def _table(timesteps: Sequence[float], sigmas: Sequence[float], sigma_data: float) -> Convention:
    """Time steps are any monotonic function of σ: interpolate log σ between the scheduler's own pairs."""
    pairs = sorted({t: s for t, s in zip(timesteps, sigmas, strict=False) if s > 0}.items())
    if not pairs:
        return UNKNOWN
    known = [t for t, _ in pairs]
    logs = [log(s / sigma_data) for _, s in pairs]
    slopes = [(b - a) / (u - t) for (a, b), (t, u) in zip(pairwise(logs), pairwise(known), strict=True)]

    def level(timestep: float) -> float:
        i = min(max(bisect_left(known, timestep) - 1, 0), max(len(slopes) - 1, 0))
        slope = slopes[i] if slopes else 0.0
        return level_of_sigma(exp(min(logs[i] + slope * (timestep - known[i]), 80.0)))

    margin = (known[-1] - known[0]) / 2
    return Convention(level, lambda t: known[0] - margin <= t <= known[-1] + margin)
