"""The training loop: one cycle of Nesterov SGD over a budget of minutes or steps, with checkpoints to go on from.

Random numbers come from (seed, step), so a run that is killed and started again does what the uninterrupted run does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_sd.data import step_rng
from emoji_sd.loop import atomic_save
from torch import Tensor, nn

from diffattn.metrics.classifier import Classifier

from .augment import BatchOf


@dataclass(frozen=True)
class Recipe:
    batch: int = 128
    steps: int | None = None  # budget in optimizer steps …
    minutes: float | None = None  # … or in minutes of training (all runs together)
    lr: float = 0.1  # peak; mean loss
    warmup: float = 0.2  # share of the budget in which the rate rises; then it falls to 0, both linearly
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not of biases and norms
    label_smoothing: float = 0.1
    seed: int = 0
    device: str = "cpu"
    log_every: float = 10.0  # seconds
    save_every: float = 60.0  # seconds


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    raised: list[tuple[int, float]] = field(default_factory=list)  # (step, rate) where a larger budget raised the rate

    def done(self, recipe: Recipe) -> float:
        """0 at the start, 1 when the budget is spent."""
        if recipe.steps is not None:
            return self.step / recipe.steps
        if recipe.minutes is None:
            raise ValueError("a recipe needs a budget: steps or minutes")
        return self.seconds / (60 * recipe.minutes)


def learning_rate(done: float, recipe: Recipe) -> float:
    """A triangle over the budget."""
    return recipe.lr * max(min(done / recipe.warmup, (1 - done) / (1 - recipe.warmup)), 0.01)


def train(model: Classifier, batch_of: BatchOf, recipe: Recipe, checkpoint: Path) -> Progress:
    """Train in place until the budget is spent, going on from `checkpoint` if it exists."""
    optimizer = torch.optim.SGD(_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    progress = _resume(checkpoint, model, optimizer, recipe.device)
    _note_larger_budget(progress, recipe, last=optimizer.param_groups[0]["lr"])
    model.train()
    log = _Log(recipe, progress)
    saved = time.monotonic()
    while progress.done(recipe) < 1:
        start = time.monotonic()
        rate = learning_rate(progress.done(recipe), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, right = _step(model, optimizer, batch_of(progress.step, step_rng(recipe.seed, progress.step)), recipe)
        progress.step += 1
        progress.seconds += time.monotonic() - start
        log.add(loss, right, rate)
        if time.monotonic() - saved > recipe.save_every:
            _save(checkpoint, model, optimizer, progress)
            saved = time.monotonic()
    _save(checkpoint, model, optimizer, progress)
    log.line()
    model.eval()
    return progress


def _note_larger_budget(progress: Progress, recipe: Recipe, last: float) -> None:
    """A run that goes on with a larger budget than before starts a second descent: the card is to say so."""
    rate = learning_rate(progress.done(recipe), recipe)
    if progress.done(recipe) > recipe.warmup and rate > 1.5 * last:
        progress.raised.append((progress.step, rate))


def _step(
    model: Classifier, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """One update. → loss, share of right answers"""
    x = batch[0].to(recipe.device).contiguous(memory_format=torch.channels_last)
    y = batch[1].to(recipe.device)
    logits = model(x)
    loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == y).float().mean()


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    atomic_save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}, path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> Progress:
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


@dataclass
class _Log:
    """One line every `log_every` seconds: step, loss, accuracy, learning rate, speed, time left."""

    recipe: Recipe
    progress: Progress
    losses: list[Tensor] = field(default_factory=list)
    rights: list[Tensor] = field(default_factory=list)
    rate: float = 0.0

    def __post_init__(self) -> None:
        self._mark()

    def _mark(self) -> None:
        self.losses, self.rights, self.time = [], [], time.monotonic()
        self.seconds, self.done = self.progress.seconds, self.progress.done(self.recipe)

    def add(self, loss: Tensor, right: Tensor, rate: float) -> None:
        self.losses.append(loss)
        self.rights.append(right)
        self.rate = rate
        if time.monotonic() - self.time > self.recipe.log_every:
            self.line()

    def line(self) -> None:
        if not self.losses:
            return
        seconds = self.progress.seconds - self.seconds
        done = self.progress.done(self.recipe)
        loss = _mean(self.losses)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.progress.step}; start again with a lower learning rate")
        left = max(1 - done, 0) * seconds / max(done - self.done, 1e-9)
        print(
            f"step {self.progress.step} loss {loss:.3f} right {100 * _mean(self.rights):.1f}%"
            f" lr {self.rate:.3f} {len(self.losses) * self.recipe.batch / seconds:.0f} img/s"
            f" done {100 * done:.0f}% left {left / 60:.1f} min",
            flush=True,
        )
        self._mark()


def _mean(values: Iterable[Tensor]) -> float:
    return torch.stack(list(values)).mean().item()
