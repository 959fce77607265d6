"""Time steps of models that were trained on DiT's schedule: from data to noise, 0 to 999."""

from collections.abc import Callable
from functools import cache
from typing import Any

from diffattn.noise_level import NoiseLevels, Reading, discrete, dit_alphas_cumprod, values_of


def read_dit_time(time: Any, levels: NoiseLevels) -> Reading:
    """A discrete step of the pipeline's scheduler, or without one of DiT's training schedule."""
    if levels.scheduler is not None:
        return levels.read(time)
    now = [_level()(t) for t in values_of(time)]
    return Reading(now, now, None)


@cache
def _level() -> Callable[[float], float]:
    return discrete(dit_alphas_cumprod())
