"""Kernel distance between the features of two sets of pictures: unbiased, so it also suits small sets.

Shapes: N generated pictures, M of the reference, d features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from diffattn.metrics.reference import Reference, check_features

ROWS = 1024  # pictures whose kernels with all others are held at once


@dataclass(frozen=True)
class Kid:
    """Mean over subsets (lower is better; near 0, also below it, for sets of one kind) and their deviation."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kid(
    features: Tensor,
    reference: Reference | Tensor,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> Kid:
    """Kernel inception distance (Bińkowski et al. 2018): unbiased squared MMD, kernel (x·y/d + 1)³, float64.

    Args:
        features: of the generated pictures [N, d].
        reference: what they are measured against; a tensor is features [M, d].
        subsets: how many pairs of subsets are drawn.
        subset_size: pictures of each, drawn without replacement. None: 1,000, or half of the smaller set if that is
            less (subsets of all pictures would be one and the same).
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 pictures on either side, values that are NaN or infinite, unequal d, a subset size
            below 2 or above N or M, a reference without features.
    """
    fake, real = check_features(features), check_features(reference_features(reference))
    if fake.shape[1] != real.shape[1]:
        raise ValueError(f"both sides need features of one extractor, got {fake.shape[1]} and {real.shape[1]} features")
    least = min(len(fake), len(real))
    size = subset_size if subset_size is not None else max(min(1000, least // 2), 2)
    if not 2 <= size <= least:
        raise ValueError(f"subset_size must be 2 to {least}, the smaller number of pictures, got {size}")
    if subsets < 1:
        raise ValueError(f"subsets must be 1 or more, got {subsets}")
    rng = torch.Generator().manual_seed(seed)
    found = torch.stack([poly_mmd(_draw(real, size, rng), _draw(fake, size, rng)) for _ in range(subsets)])
    return Kid(found.mean().item(), found.std(correction=0).item(), subsets, size)


def kid_without(features: Tensor, reference: Reference | Tensor, groups: Tensor) -> Tensor:
    """Unbiased squared MMD of all pictures without each group of the generated ones, for `grouped_interval`.

    The mean over pairs within the reference is left out: it is the same for all that are measured against it.

    Args:
        features: of the generated pictures [N, d].
        reference: as `kid`.
        groups: group of every picture [N], 0 to G - 1, none of them empty; two pictures or more are left without each.

    Returns:
        [G] float64.

    Raises:
        ValueError: as `kid`.
    """
    fake, real = check_features(features), check_features(reference_features(reference))
    member = torch.nn.functional.one_hot(groups).double()  # [N, G]
    within, across = member.new_zeros(member.shape[1], member.shape[1]), member.new_zeros(member.shape[1])
    for rows in torch.arange(len(fake)).split(ROWS):
        kernel = _kernel(fake[rows], fake)
        kernel[torch.arange(len(rows)), rows] = 0  # no picture with itself
        within += member[rows].T @ kernel @ member
        across += member[rows].T @ _kernel(fake[rows], real).sum(dim=1)
    left = len(fake) - member.sum(dim=0)
    pairs = within.sum() - 2 * within.sum(dim=0) + within.diagonal()
    return pairs / (left * (left - 1)) - 2 * (across.sum() - across) / (left * len(real))


def reference_features(reference: Reference | Tensor) -> Tensor:
    if isinstance(reference, Tensor):
        return reference
    if reference.features is None:
        raise ValueError(
            f"reference {reference.name!r} contains mean and covariance only; this metric needs its features"
        )
    return reference.features


def _draw(x: Tensor, size: int, rng: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=rng)[:size]]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
