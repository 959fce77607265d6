"""Uniform time grids on the schedulers that sample a velocity model, and the model's own time."""

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor


def set_uniform_timesteps(scheduler: Any, num_steps: int, device: str | torch.device | None = None) -> None:
    """Set a uniform grid of N steps from noise to data, to which the scheduler applies its own shift, if any.

    Euler evaluates the model N times, at 1, 1 - 1/N, ..., 1/N in the noise level 1 - t; Heun 2N - 1 times, since its
    last step is Euler's; for Euler-Maruyama see `EulerMaruyamaScheduler.set_timesteps`.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), device=device)  # type: ignore[arg-type]
    elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        _set_heun(scheduler, num_steps, device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    scheduler.set_begin_index(0)


def _set_heun(scheduler: FlowMatchHeunDiscreteScheduler, num_steps: int, device: str | torch.device | None) -> None:
    """Heun's grid runs from sigma_max to sigma_min, by default 1/num_train_timesteps, and then jumps to 0."""
    bounds = scheduler.sigma_max, scheduler.sigma_min
    try:
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / num_steps
        scheduler.set_timesteps(num_steps)
    finally:
        scheduler.sigma_max, scheduler.sigma_min = bounds
    scheduler.timesteps = scheduler.timesteps.to(device)  # but not `sigmas`, on which every step branches


def times(scheduler: Any) -> Tensor:
    """t = 1 - timestep/num_train_timesteps of all upcoming evaluations [T], fp32, on the device of the time steps."""
    return 1 - scheduler.timesteps.to(torch.float32) / scheduler.config.num_train_timesteps
