"""The diffusion forms of the SDE of SiT (Ma et al., ECCV 2024, table 8).

D(t) is half of the squared noise rate of dx = [v + D·score]dt + √(2D)dW; every D ≥ 0 has the same marginals, and D = 0
is the ODE. Time t runs from 0 (noise) to 1 (data); c is the strength.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from diffattn.sampling.paths import Path

Diffusion = Callable[[Path, Tensor, float], Tensor]
"""(path, t [...], c) -> D [...]"""


def constant(path: Path, t: Tensor, c: float) -> Tensor:
    """D = c."""
    return torch.full_like(t, c)


def sigma(path: Path, t: Tensor, c: float) -> Tensor:
    """D = c·σ(t)."""
    return c * path.sigma(t)


def linear(path: Path, t: Tensor, c: float) -> Tensor:
    """D = c·(1 - t)."""
    return c * (1 - t)


def decreasing(path: Path, t: Tensor, c: float) -> Tensor:
    """D = ¼(c·cos πt + 1)²."""
    return 0.25 * (c * torch.cos(math.pi * t) + 1) ** 2


def increasing_decreasing(path: Path, t: Tensor, c: float) -> Tensor:
    """D = c·sin²πt."""
    return c * torch.sin(math.pi * t) ** 2


def sbdm(path: Path, t: Tensor, c: float) -> Tensor:
    """D = c·(σ²α̇/α - σσ̇) = c·Wσ/α, that of score-based diffusion models: infinite at t = 0."""
    return c * path.wronskian * path.sigma(t) / path.alpha(t)


DIFFUSIONS: Mapping[str, Diffusion] = MappingProxyType(
    {
        "sigma": sigma,
        "constant": constant,
        "linear": linear,
        "decreasing": decreasing,
        "increasing-decreasing": increasing_decreasing,
        "sbdm": sbdm,
    }
)
"""Name -> diffusion form."""
