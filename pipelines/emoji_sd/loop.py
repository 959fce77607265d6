"""How every stage is trained: AdamW or Muon under a cosine, and an average of the weights kept in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from training_loop import LoopConfig, Losses, Progress, Show, Trainee
from training_loop import train as train_loop

from diffattn.training.muon import MuonWithAdamW

M = TypeVar("M", bound=nn.Module)
StageLoss = Callable[[nn.Module, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Curves:
    """The learning rate and the decay of the averaged weights over the budget."""

    lr: float  # peak
    warmup: float = 0.02  # share of the budget
    final_lr: float = 0.02  # share of the peak
    ema: float = 0.999  # decay at the start …
    final_ema: float | None = None  # … and at the end; None: the same
    muon: bool = False  # Muon for matrices and kernels

    def rate(self, done: float) -> float:
        """Linear warm-up, then half a cosine."""
        if done < self.warmup:
            return self.lr * max(done / self.warmup, 0.01)
        x = min((done - self.warmup) / (1 - self.warmup), 1.0)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * x)))

    def ema_decay(self, done: float) -> float:
        """From `ema` to `final_ema`, linearly."""
        return self.ema if self.final_ema is None else self.ema + (self.final_ema - self.ema) * min(done, 1.0)


def checkpoint_names(kind: str, sides: Sequence[int]) -> list[str]:
    """The file of every stage: `unet-64.pt`, and `unet-64-2.pt` for the second stage on latents of that side."""
    times = [sides[: i + 1].count(side) for i, side in enumerate(sides)]
    return [f"{kind}-{side}.pt" if n == 1 else f"{kind}-{side}-{n}.pt" for side, n in zip(sides, times, strict=True)]


def build_optimizer(model: nn.Module, curves: Curves) -> torch.optim.Optimizer:
    if curves.muon:
        return MuonWithAdamW(model, curves.lr)
    return torch.optim.AdamW(model.parameters(), lr=curves.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)


def train(
    name: str,
    model: M,
    loss_of: StageLoss,
    curves: Curves,
    cfg: LoopConfig,
    checkpoint: Path,
    show: Show | None = None,
) -> tuple[M, Progress]:
    """Train until the budget is spent, going on from `checkpoint` if it exists. → (EMA model, progress)"""
    optimizer = build_optimizer(model, curves)
    ema = copy.deepcopy(model).requires_grad_(False)
    trainee = Trainee(model, optimizer, curves.rate, ema, curves.ema_decay)
    trainee.resume(checkpoint, cfg)

    def losses_of(model: nn.Module, step: int, rng: torch.Generator) -> Losses:
        return {"loss": loss_of(model, step, rng)}

    train_loop(name, trainee, losses_of, cfg, checkpoint, show)
    return ema, trainee.progress
