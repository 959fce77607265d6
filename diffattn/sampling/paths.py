"""Interpolants between noise and data, and what follows from a velocity (Ma et al., SiT, ECCV 2024, section 2).

Time t runs from 0 (noise) to 1 (data); a sample on the path is x_t = α(t)·data + σ(t)·noise, and its velocity
v = α̇(t)·data + σ̇(t)·noise. Both paths here have a constant W = α̇σ - ασ̇, so that x and v give back

    data = (σv - σ̇x) / W        noise = (α̇x - αv) / W        score = -noise / σ

without a division by zero, except for the score at t = 1.

Shapes: data, noise, x, v [B, ...]; t [B], or a scalar tensor for all samples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

HALF_PI = math.pi / 2


class Path(ABC):
    """An interpolant. Times outside [0, 1] are not checked; results have the dtype that torch promotes to."""

    wronskian: ClassVar[float]  # W

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the amplitude of the data, like t [...]: 0 at t = 0, 1 at t = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the amplitude of the noise, like t [...]: 1 at t = 0, 0 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """α̇ = dα/dt, like t [...]."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """σ̇ = dσ/dt, like t [...]."""

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α·data + σ·noise [B, ...]."""
        t = _expand(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = α̇·data + σ̇·noise [B, ...], the target of a velocity model at x_t."""
        t = _expand(t, data)
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) = -noise / σ [B, ...]. At t = 1 it is infinite, and NaN where the noise estimate is 0."""
        return -self.noise_estimate(v, x, t) / self.sigma(_expand(t, x))

    def data_estimate(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data that v points to, (σv - σ̇x) / W [B, ...]: finite for all t, and x itself at t = 1."""
        t = _expand(t, x)
        return (self.sigma(t) * v - self.d_sigma(t) * x) / self.wronskian

    def noise_estimate(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that v comes from, (α̇x - αv) / W [B, ...]: finite for all t, and x itself at t = 0."""
        t = _expand(t, x)
        return (self.d_alpha(t) * x - self.alpha(t) * v) / self.wronskian


class LinearPath(Path):
    """α = t, σ = 1 - t: straight lines, as in flow matching."""

    wronskian = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class GVPPath(Path):
    """α = sin(πt/2), σ = cos(πt/2): a generalised variance-preserving path, α² + σ² = 1."""

    wronskian = HALF_PI

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * (1 - t))  # cos(πt/2), and exactly 0 at t = 1

    def d_alpha(self, t: Tensor) -> Tensor:
        return HALF_PI * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -HALF_PI * self.alpha(t)


PATHS: Mapping[str, Path] = MappingProxyType({"linear": LinearPath(), "gvp": GVPPath()})
"""Name -> interpolant."""


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """t [B] -> [B, 1, ...] against x [B, ...]; a scalar stays one."""
    return t if t.dim() == 0 else t.reshape(-1, *[1] * (x.dim() - 1))
