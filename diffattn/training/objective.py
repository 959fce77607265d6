"""The loss of a training step: the velocity error, plus the distillation term.

Shapes: B samples of one process, G samples of the global batch, c channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn

from diffattn.sampling.paths import PATHS, Path
from diffattn.training.config import ObjectiveConfig
from diffattn.training.random import step_generator

TIME, NOISE, DROPOUT, MEDIATORS = 100, 101, 102, 103
"""Streams of random numbers, see `step_generator`."""


@dataclass
class Draw:
    """The random numbers of one step, for the samples of one process."""

    t: Tensor  # [B], 0 noise ... 1 data
    noise: Tensor  # [B, c, H, W]
    drop: Tensor  # [B] bool: train without class
    num_mediators: int | None  # the same for all samples of all processes

    def rows(self, rows: slice) -> "Draw":
        """The random numbers of some of the samples."""
        return Draw(self.t[rows], self.noise[rows], self.drop[rows], self.num_mediators)


def draw(
    config: ObjectiveConfig, seed: int, step: int, batch: int, shape: tuple[int, ...], mediators: tuple[int, ...]
) -> Draw:
    """The random numbers of a whole global batch, on the CPU.

    They depend on (seed, step) alone: a resumed run draws the same as an uninterrupted one, and several processes that
    each take their own rows together draw what a single one would.

    Args:
        config: of the objective.
        seed, step: of the run, and the step within it.
        batch: G.
        shape: (c, H, W).
        mediators: the numbers of mediators to train; empty for a model without mediators.
    """
    t_rng, noise_rng, drop_rng, n_rng = (step_generator(seed, step, s) for s in (TIME, NOISE, DROPOUT, MEDIATORS))
    if config.time == "uniform":
        t = torch.rand(batch, generator=t_rng)
    else:
        t = compute_density_for_timestep_sampling(
            "logit_normal", batch, config.logit_mean, config.logit_std, generator=t_rng
        )
    number = mediators[int(torch.randint(len(mediators), (1,), generator=n_rng))] if mediators else None
    drop = torch.rand(batch, generator=drop_rng) < config.label_dropout
    return Draw(t, torch.randn(batch, *shape, generator=noise_rng), drop, number)


def min_snr_weight(path: Path, t: Tensor, gamma: float) -> Tensor:
    """Weight of the squared error of the velocity [B]: min(SNR, γ)·σ² = min(α², γσ²).

    Min-SNR-γ (Hang et al., ICCV 2023, eq. 6) weights the error of the data estimate by min(SNR, γ), SNR = α²/σ²;
    that error is σ times the velocity's (times 2/π on the GVP path).
    """
    return torch.minimum(path.alpha(t) ** 2, gamma * path.sigma(t) ** 2)


class VelocityLoss:
    """Mean squared error of the velocity at x_t, per sample (Ma et al., "SiT", ECCV 2024, eq. 5)."""

    def __init__(self, config: ObjectiveConfig, null_class: int) -> None:
        self.config = config
        self.path = PATHS[config.path]
        self.null_class = null_class

    def __call__(self, model: nn.Module, data: Tensor, y: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
        """Loss per sample, weighted and unweighted.

        Args:
            model: `model(x, t, y).sample` predicts the velocity.
            data: clean images or latents [B, c, H, W].
            y: class ids [B].
            drawn: the step's random numbers for these samples.

        Returns:
            [B] for the gradient, and [B] without weights and gradient, for the log; both fp32.
        """
        t, noise = drawn.t.to(data.device), drawn.noise.to(data.device)
        labels = torch.where(drawn.drop.to(y.device), self.null_class, y)
        x = self.path.interpolate(data, noise, t)
        predicted = model(x, t, labels).sample.float()
        error = (predicted - self.path.velocity(data, noise, t)).square().flatten(1).mean(1)
        weight = 1.0 if self.config.min_snr is None else min_snr_weight(self.path, t, self.config.min_snr)
        return error * weight, error.detach()


class LossBins:
    """Mean loss per bin of t, summed on the loss's device and only read when logged."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, bins, device=device)  # loss, count
        self.bins = bins

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Add times t [B] and their losses [B]."""
        index = (t.to(loss.device) * self.bins).long().clamp(0, self.bins - 1)
        self.sums[0].index_add_(0, index, loss.float())
        self.sums[1].index_add_(0, index, torch.ones_like(loss, dtype=torch.float32))

    def read(self, total: Tensor) -> dict[str, float]:
        """Means by bin from sums over all processes [2, bins]: "loss/t0.0-0.1" and so on; then resets."""
        self.sums.zero_()
        loss, count = total.tolist()
        width, digits = 1 / self.bins, 2 if self.bins <= 100 else 3
        return {
            f"loss/t{i * width:.{digits}g}-{(i + 1) * width:.{digits}g}": a / n
            for i, (a, n) in enumerate(zip(loss, count, strict=True))
            if n
        }
