"""Write a trained classifier as a folder: fp16 weights, configuration, figures, model card."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from emoji_sd.data import to_float
from torch import Tensor

from diffattn.metrics.classifier import Classifier

from .data import Labelled

Figures = dict[str, Any]


def export(model: Classifier, folder: Path) -> Classifier:
    """Write the weights beside `folder` and swap. → the model as anyone will load it"""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    half: Any = copy.deepcopy(model).cpu().half()  # diffusers hides the signature of `to`
    half.to(memory_format=torch.contiguous_format).save_pretrained(fresh)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # written readable by their owner only
    if folder.exists():
        folder.replace(old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Classifier.from_pretrained(folder).eval()


@torch.no_grad()
def logits_of(model: Classifier, images: Tensor, batch: int = 250) -> Tensor:
    """uint8 [N, 3, S, S] → [N, classes]"""
    return torch.cat([model(to_float(part)) for part in images.split(batch)])


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Percentage of pictures whose class is among the `top` likeliest."""
    best = logits.topk(min(top, logits.shape[1])).indices
    return round(100 * (best == labels[:, None]).any(1).float().mean().item(), 2)


def measure(model: Classifier, tested: Labelled, name: str) -> Figures:
    """Accuracy on the pictures as they are, and of the mean answer to each picture and its mirror image."""
    logits = logits_of(model, tested.images)
    both = logits.softmax(1) + logits_of(model, tested.images.flip(-1)).softmax(1)
    return {
        f"{name}_pictures": len(tested),
        f"{name}_accuracy_percent": accuracy(logits, tested.labels),
        f"{name}_mirrored_accuracy_percent": accuracy(both, tested.labels),
        f"{name}_top5_percent": accuracy(logits, tested.labels, 5),
    }


def write_card(folder: Path, figures: Figures, card: str) -> None:
    """`card` is a template with the keys of the figures in braces."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "README.md").write_text(card.format_map(figures))
