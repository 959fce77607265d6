"""The formulas of SADA (Jiang et al., ICML 2025, arXiv 2507.17135) on the path of one run.

A sample is x = α·x0 + σ·ε in its scheduler's own scale. Time is the number i of the step, so that steps have length 1
whatever the spacing of the noise levels, and the gradient is y = dx/di = α'·x0 + σ'·ε, the probability-flow ODE. The
paper's t falls where i rises: its gradients, and with them the sign of its criterion, are the opposite of those here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor


@dataclass(frozen=True)
class Path:
    """What x is made of at every step.

    Attributes:
        alpha, sigma: of each of N steps, then of the result: N + 1 numbers each.
        prediction: of the denoiser: "epsilon", "v_prediction" or "sample".
    """

    alpha: list[float]
    sigma: list[float]
    prediction: str

    @classmethod
    def of(cls, scheduler: Any, timestep: Tensor | float) -> Self:
        """The rest of a run from this time step on."""
        if isinstance(scheduler, DDIMScheduler):
            kept = scheduler.alphas_cumprod[scheduler.timesteps.to(scheduler.alphas_cumprod.device)]
            kept = torch.cat([kept, scheduler.final_alpha_cumprod.reshape(1)])
            alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        else:  # these hold the ratio of noise to signal
            ratio = scheduler.sigmas
            alpha = torch.ones_like(ratio) if isinstance(scheduler, EulerDiscreteScheduler) else (1 + ratio**2).rsqrt()
            sigma = alpha * ratio
        first = int((scheduler.timesteps == timestep).nonzero()[0])
        return cls(alpha[first:].tolist(), sigma[first:].tolist(), scheduler.config["prediction_type"])

    @property
    def steps(self) -> int:
        """N."""
        return len(self.alpha) - 1

    def clean(self, i: int, output: Tensor, x: Tensor) -> Tensor:
        """x0 of step i, from the denoiser's output."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        if self.prediction == "epsilon":
            return (x - sigma * output) / alpha
        if self.prediction == "v_prediction":  # v = (α·ε - σ·x0) / √(α² + σ²)
            norm = hypot(alpha, sigma)
            return (alpha * x / norm - sigma * output) / norm
        return output

    def noise(self, i: int, clean: Tensor, x: Tensor) -> Tensor:
        """ε of step i."""
        return (x - self.alpha[i] * clean) / self.sigma[i]

    def output(self, i: int, clean: Tensor, x: Tensor) -> Tensor:
        """What a denoiser that sees this x0 would return."""
        if self.prediction == "sample":
            return clean
        noise = self.noise(i, clean, x)
        if self.prediction == "epsilon":
            return noise
        return (self.alpha[i] * noise - self.sigma[i] * clean) / hypot(self.alpha[i], self.sigma[i])

    def gradient(self, i: int, clean: Tensor, noise: Tensor) -> Tensor:
        """y of step i, α' and σ' by central differences (forward at the first step)."""
        before, after = max(i - 1, 0), i + 1
        slopes = ((level[after] - level[before]) / (after - before) for level in (self.alpha, self.sigma))
        return next(slopes) * clean + next(slopes) * noise


def adams_moulton(x: Tensor, y: Tensor, y_1: Tensor, y_2: Tensor) -> Tensor:
    """x one step on, by the paper's third-order formula: exact where y is linear.

    Args:
        y, y_1, y_2: gradients at x, one step earlier and two.
    """
    return x + (5 * y + 5 * y_1 - 4 * y_2) / 6


def is_stable(x: Tensor, guess: Tensor, y: Tensor, y_1: Tensor, y_2: Tensor) -> bool:
    """The stability criterion (x - x̂)·Δ²y, here ≥ 0, so that a straight line is stable. One answer for the batch.

    Args:
        x, guess: the sampler's new sample, and what `adams_moulton` made of the gradients before it.
    """
    return bool(((x - guess) * (y - 2 * y_1 + y_2)).sum() >= 0)


def lagrange(nodes: Mapping[int, Tensor], at: int) -> Tensor:
    """The polynomial through (i, nodes[i]) at another i."""
    total = torch.zeros_like(next(iter(nodes.values())))
    for i, value in nodes.items():
        weight = 1.0
        for j in nodes:
            weight *= (at - j) / (i - j) if j != i else 1.0
        total += weight * value
    return total
