"""Time steps of models that were trained on DiT's schedule: from data to noise, 0 to 999."""

from functools import cache
from typing import Any

from diffattn.noise_level import Convention, Reading, TimeReader, discrete, dit_alphas_cumprod


def read_dit_time(time: Any, levels: TimeReader) -> Reading:
    """The noise level of a time step of the scheduler in use or, if none is known, of DiT's training schedule."""
    return levels.read(time, _training())


@cache
def _training() -> Convention:
    return discrete(dit_alphas_cumprod())
