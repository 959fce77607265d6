"""The training loop of every stage: budget, learning rate, EMA, atomic checkpoints, progress line.

Random numbers come from (seed, step), so a run that is killed and started again does what the uninterrupted run does.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffattn.files import write_whole

from .data import step_rng


@dataclass(frozen=True)
class LoopConfig:
    batch: int
    lr: float  # peak learning rate
    steps: int | None = None  # budget in optimizer steps …
    minutes: float | None = None  # … or in minutes of training (all runs of the stage together)
    warmup: float = 0.02  # share of the budget
    final_lr: float = 0.02  # share of the peak
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    log_every: float = 20.0  # seconds
    save_every: float = 180.0  # seconds
    show_every: float = 900.0  # seconds between calls of `show`


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    samples: int = 0

    def done(self, cfg: LoopConfig) -> float:
        """0 at the start, 1 when the budget is spent."""
        if cfg.minutes is not None:
            return self.seconds / (cfg.minutes * 60)
        if cfg.steps is None:
            raise ValueError("give the stage a budget: steps or minutes")
        return self.step / cfg.steps


def learning_rate(done: float, cfg: LoopConfig) -> float:
    """Linear warm-up, then half a cosine."""
    if done < cfg.warmup:
        return cfg.lr * max(done / cfg.warmup, 0.01)
    x = min((done - cfg.warmup) / (1 - cfg.warmup), 1.0)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * x)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def atomic_save(state: object, path: Path) -> None:
    write_whole(path, lambda part: torch.save(state, part))


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, int, torch.Generator], Tensor],
    cfg: LoopConfig,
    checkpoint: Path,
    show: Callable[[nn.Module, Progress], None] | None = None,
) -> tuple[nn.Module, Progress]:
    """Train `model` until the budget is spent, going on from `checkpoint` if it exists. → (EMA model, progress)"""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.99), fused=True
    )
    progress = _resume(checkpoint, model, ema, optimizer, cfg.device)
    log = _Log(name, cfg, progress)
    saved = shown = time.monotonic()
    while progress.done(cfg) < 1:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.done(cfg), cfg)
        loss = loss_of(model, progress.step, step_rng(cfg.seed, progress.step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        update_ema(ema, model, progress.step, cfg.ema)
        progress.step, progress.samples = progress.step + 1, progress.samples + cfg.batch
        progress.seconds += time.monotonic() - start
        log.add(loss, optimizer.param_groups[0]["lr"])
        now = time.monotonic()
        if now - saved > cfg.save_every:
            _save(checkpoint, model, ema, optimizer, progress)
            saved = now
        if show is not None and now - shown > cfg.show_every:
            show(ema, progress)
            shown = time.monotonic()
    _save(checkpoint, model, ema, optimizer, progress)
    log.line()
    return ema, progress


def _save(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
    }
    atomic_save(state, path)


def _resume(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> Progress:
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


class _Log:
    """One line every `log_every` seconds: step, mean loss, learning rate, images per second, time left."""

    def __init__(self, name: str, cfg: LoopConfig, progress: Progress):
        self.name, self.cfg, self.progress = name, cfg, progress
        self.losses: list[Tensor] = []
        self.lr = 0.0
        self._mark()

    def _mark(self) -> None:
        self.losses, self.time = [], time.monotonic()
        self.samples, self.seconds, self.done = self.progress.samples, self.progress.seconds, self._done()

    def _done(self) -> float:
        return self.progress.done(self.cfg)

    def add(self, loss: Tensor, lr: float) -> None:
        self.losses.append(loss.detach())
        self.lr = lr
        if time.monotonic() - self.time > self.cfg.log_every:
            self.line()

    def line(self) -> None:
        if not self.losses:
            return
        seconds = self.progress.seconds - self.seconds
        speed = (self.progress.samples - self.samples) / seconds
        left = (1 - self._done()) * seconds / max(self._done() - self.done, 1e-9)
        loss = torch.stack(self.losses).mean().item()
        print(
            f"{self.name} step {self.progress.step} loss {loss:.4f} lr {self.lr:.1e} {speed:.1f} img/s"
            f" done {100 * self._done():.0f}% left {left / 60:.1f} min",
            flush=True,
        )
        self._mark()
