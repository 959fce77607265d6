"""A call whose samples may be in phases of their own, phase by phase."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_phase(phases: int | tuple[Any, ...], run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`run(phase, *tensors)`: once, or for the samples of each phase together.

    Args:
        phases: of the batch, or one per sample, perhaps with more that distinguishes samples.
        run: returns a tensor [B, ...] for the samples passed to it.
        tensors: [B, ...], or [B·heads, ...] sample by sample, or [1, ...] for all samples.
    """
    if isinstance(phases, int):
        return run(phases, *tensors)
    groups = {phase: [i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))}
    if len(groups) == 1:
        return run(phases[0], *tensors)
    out: Tensor | None = None
    for phase, group in groups.items():
        part = run(phase, *(None if x is None else _rows(x, group, len(phases)) for x in tensors))
        if out is None:
            out = part.new_empty(len(phases), *part.shape[1:])
        out[torch.tensor(group, device=part.device)] = part
    assert out is not None
    return out


def _rows(x: Tensor, group: list[int], batch: int) -> Tensor:
    """The samples `group` of a tensor with a batch dimension, or of a mask repeated per head or for all; where they
    follow each other, a view."""
    if x.shape[0] == 1:
        return x
    if x.shape[0] != batch:
        return _rows(x.unflatten(0, (batch, -1)), group, batch).flatten(0, 1)
    if group[-1] - group[0] == len(group) - 1:
        return x[group[0] : group[-1] + 1]
    return x[torch.tensor(group, device=x.device)]
