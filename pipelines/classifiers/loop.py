"""How a classifier is trained: one cycle of Nesterov SGD."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from training_loop import Budget, LoopConfig, Losses, LossOf, Progress, Trainee
from training_loop import train as train_loop

from diffattn.metrics.classifier import Classifier

from .augment import BatchOf


@dataclass(frozen=True)
class Recipe:
    budget: Budget
    batch: int = 128
    lr: float = 0.1  # peak; mean loss
    warmup: float = 0.2  # share of the budget in which the rate rises; then it falls to 0, both linearly
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not of biases and norms
    label_smoothing: float = 0.1
    seed: int = 0
    device: str = "cpu"
    log_every: float = 10.0  # seconds
    save_every: float = 60.0  # seconds

    def rate(self, done: float) -> float:
        """A triangle over the budget."""
        return self.lr * max(min(done / self.warmup, (1 - done) / (1 - self.warmup)), 0.01)

    def loop(self) -> LoopConfig:
        return LoopConfig(
            self.budget, self.batch, self.seed, self.device, log_every=self.log_every, save_every=self.save_every
        )


def train(model: Classifier, batch_of: BatchOf, recipe: Recipe, checkpoint: Path) -> Progress:
    """Train in place until the budget is spent, resuming from `checkpoint` if it exists."""
    cfg = recipe.loop()
    optimizer = torch.optim.SGD(_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    trainee = Trainee(model, optimizer, recipe.rate)
    trainee.resume(checkpoint, cfg)
    _note_larger_budget(trainee.progress, recipe, last=optimizer.param_groups[0]["lr"])
    model.train()
    train_loop(checkpoint.stem, trainee, classifier_losses(batch_of, recipe), cfg, checkpoint)
    model.eval()
    return trainee.progress


def _note_larger_budget(progress: Progress, recipe: Recipe, last: float) -> None:
    """A run resumed with a larger budget starts a second descent, which the card must mention."""
    done = progress.done(recipe.budget)
    if done > recipe.warmup and recipe.rate(done) > 1.5 * last:
        progress.raised.append((progress.step, recipe.rate(done)))


def classifier_losses(batch_of: BatchOf, recipe: Recipe) -> LossOf:
    """Cross entropy, and the share of right answers."""

    def losses_of(model: nn.Module, step: int, rng: torch.Generator) -> Losses:
        x, y = (part.to(recipe.device) for part in batch_of(step, rng))
        logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        return {"loss": loss, "right": (logits.detach().argmax(1) == y).float().mean()}

    return losses_of


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
