"""From a scheduler's time steps to noise levels, on the host and without waiting for the device.

The noise level is u = σ/(1 + σ), σ the ratio of noise to signal amplitude: 1 is pure noise, 0 is data.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import exp, log, sqrt
from operator import mul
from typing import Any, NamedTuple

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


class Reading(NamedTuple):
    """What a time step says."""

    levels: list[float]  # noise level in [0, 1]: one, or one per sample
    to_come: list[float]  # noise levels from here to the end of the run, as far as they are known
    run: int | None  # changes whenever the scheduler's time steps are set anew; None if it is not known


class NoiseLevels:
    """Reads noise levels off what a denoiser is given as its time step.

    Works for discrete schedulers (integer or fractional steps over `alphas_cumprod`), flow matching, and those
    whose time step is another function of σ (EDM, continuous Euler), which are looked up in their own tables.
    A time step that is a view of the scheduler's `timesteps`, as in every pipeline's loop, is recognised by its
    place in memory, so that nothing waits for the device; those are copied to the host once per run.
    """

    def __init__(self, scheduler: Any = None) -> None:
        """`scheduler`: a diffusers scheduler; None means Stable Diffusion's training schedule."""
        self.scheduler = scheduler
        self._convert: Callable[[float], float] | None = None
        self._steps: Tensor | None = None  # the run's time steps
        self._steps_version = 0
        self._steps_levels: list[float] = []
        self._runs_seen = 0

    def read(self, timestep: Tensor | float) -> Reading:
        """The noise level of a time step: one, or one per sample if they differ in a tensor [B]."""
        if isinstance(timestep, Tensor):
            position = self._position(timestep)
            if position is not None:
                to_come = self._schedule()[position:]
                return Reading(to_come[:1], to_come, self._runs_seen)
        levels = [self._level(t) for t in values_of(timestep)]
        return Reading(levels, levels, None)

    def _position(self, timestep: Tensor) -> int | None:
        """Index into the scheduler's time steps of which `timestep` is a view, if it is one."""
        steps = getattr(self.scheduler, "timesteps", None)
        if not isinstance(steps, Tensor) or timestep.dtype != steps.dtype or not steps.is_contiguous():
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
            self._convert = None  # tables of σ belong to a run
            self._steps_levels = [self._level(t) for t in steps.tolist()]
            self._steps, self._steps_version = steps, version
            self._runs_seen += 1
        return self._steps_levels

    def _level(self, timestep: float) -> float:
        if self._convert is None:
            self._convert = _converter(self.scheduler)
        return self._convert(timestep)


def values_of(timestep: Tensor | float) -> list[float]:
    """A time step's value, or one per sample if they differ in a tensor [B]. On a device, this waits for it."""
    if not isinstance(timestep, Tensor):
        return [float(timestep)]
    values = timestep.detach().flatten()
    numbers = values[:1].tolist() if values.stride() == (0,) else values.tolist()
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _converter(scheduler: Any) -> Callable[[float], float]:
    """How one scheduler's time steps become noise levels."""
    config = getattr(scheduler, "config", {})
    trained_on = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if scheduler is None:
        return discrete(stable_diffusion_alphas_cumprod())
    if _is_flow_matching(scheduler):
        return lambda t: min(max(t / trained_on, 0.0), 1.0)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    by_table = hasattr(scheduler, "precondition_noise") or config.get("timestep_type") == "continuous"
    if alphas_cumprod is not None and not by_table:
        return discrete(alphas_cumprod.tolist())
    if isinstance(getattr(scheduler, "sigmas", None), Tensor) and len(scheduler.timesteps):
        return _table(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), config.get("sigma_data", 1.0))
    return lambda t: min(max(t / trained_on, 0.0), 1.0)


def _is_flow_matching(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


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


def discrete(alphas_cumprod: Sequence[float]) -> Callable[[float], float]:
    """Time steps index ᾱ: u = √(1-ᾱ) / (√ᾱ + √(1-ᾱ)); fractional ones are interpolated."""
    levels = [sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) for a in (min(max(a, 0.0), 1.0) for a in alphas_cumprod)]

    def level(timestep: float) -> float:
        t = min(max(timestep, 0.0), len(levels) - 1.0)
        i = min(int(t), len(levels) - 2)
        return levels[i] + (t - i) * (levels[i + 1] - levels[i])

    return level


def _table(timesteps: Sequence[float], sigmas: Sequence[float], sigma_data: float) -> Callable[[float], float]:
    """Time steps are any monotonic function of σ: interpolate log σ between the scheduler's own pairs."""
    pairs = sorted({t: s for t, s in zip(timesteps, sigmas, strict=False) if s > 0}.items())
    if not pairs:
        return lambda t: min(max(t, 0.0), 1.0)
    known = [t for t, _ in pairs]
    logs = [log(s / sigma_data) for _, s in pairs]
    slopes = [(b - a) / (u - t) for (a, b), (t, u) in zip(pairwise(logs), pairwise(known), strict=True)]

    def level(timestep: float) -> float:
        i = min(max(bisect_left(known, timestep) - 1, 0), max(len(slopes) - 1, 0))
        slope = slopes[i] if slopes else 0.0
        sigma = exp(min(logs[i] + slope * (timestep - known[i]), 80.0))
        return sigma / (1 + sigma)

    return level
