"""Improved precision and recall: how many generated pictures look real, and how much of the real data is covered.

Shapes: N generated pictures, M of the reference, d features.
"""

import torch
from torch import Tensor

from diffattn.metrics.kid import reference_features
from diffattn.metrics.reference import Reference, check_features

ROWS = 2048  # pictures whose distances to all others are held at once


def precision_recall(features: Tensor, reference: Reference | Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1–2), each in 0..1, higher is better.

    A set covers the balls around its members that reach to their k-th nearest neighbour in the set. Precision is the
    share of generated pictures within what the reference covers, recall the share of the reference within what the
    generated pictures cover. Both depend on N and M; the paper has 50,000 each.

    Args:
        features: of the generated pictures [N, d].
        reference: what they are measured against; a tensor is features [M, d].
        neighbours: k.

    Raises:
        ValueError: k below 1, k pictures or fewer on either side, values that are NaN or infinite, unequal d, a
            reference without features.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be 1 or more, got {neighbours}")
    fake = check_features(features, neighbours + 1)
    real = check_features(reference_features(reference), neighbours + 1)
    if fake.shape[1] != real.shape[1]:
        raise ValueError(f"both sides need features of one extractor, got {fake.shape[1]} and {real.shape[1]} features")
    return _covered(fake, real, _radii(real, neighbours)), _covered(real, fake, _radii(fake, neighbours))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance of every member to its k-th nearest other one. [N, d] -> [N]"""
    nearest = [torch.cdist(rows, x).topk(neighbours + 1, largest=False).values for rows in x.split(ROWS)]
    return torch.cat(nearest)[:, -1]  # the nearest is the member itself


def _covered(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of x within a ball."""
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in x.split(ROWS)]
    return torch.cat(inside).double().mean().item()
