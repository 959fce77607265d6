"""Batches of a training run, some at a time, compared bit for bit."""

from itertools import islice

import torch
from torch import Tensor

from diffattn.training.batches import Batches

Batch = tuple[Tensor, Tensor]


def take(count: int, batches: Batches, start: int = 0) -> list[Batch]:
    return list(islice(batches.iterate(start), count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )
