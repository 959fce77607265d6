"""Fréchet distance between the features of two sets of pictures, and its limit for many pictures.

torchmetrics computes the distance between pictures that it sees itself; here it is between features and statistics.
Shapes: N generated pictures, d features.
"""

import torch
from torch import Tensor

from diffattn.metrics.reference import Reference, Statistics, check_features

ROUNDING = 1e-5  # of the largest eigenvalue: how far below 0 the least may be, of statistics stored in float32


def fid(features: Tensor, reference: Reference | Statistics | Tensor) -> float:
    """Fréchet inception distance (Heusel et al. 2017, eq. 6) of generated pictures. Lower is better, 0 the least.

    It is biased: it grows as N falls. State N, and compare figures of equal N only.

    Args:
        features: of the generated pictures [N, d].
        reference: what they are measured against; a tensor is features [M, d].

    Raises:
        ValueError: fewer than 2 pictures on either side, values that are NaN or infinite, unequal d, a reference whose
            covariance has negative eigenvalues.
    """
    target = _statistics(reference)
    return _distance(Statistics.of(features), target, _root(target.cov))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) in float64.

    Raises:
        ValueError: unequal d; a covariance with negative eigenvalues, which is invalid: the distance would be 0.
    """
    _check_eigenvalues(torch.linalg.eigvalsh(a.cov))
    return _distance(a, b, _root(b.cov))


def fid_infinity(
    features: Tensor, reference: Reference | Statistics | Tensor, num_sizes: int = 15, seed: int = 0
) -> float:
    """FID for infinitely many generated pictures (Chong & Forsyth 2020): the intercept of FID against 1/N.

    The line is fitted over evenly spaced sizes up to N, each a random draw without replacement. The smallest is N/10,
    but at least d + 1: below that covariances are singular and FID is not linear in 1/N.

    Args:
        features: of the generated pictures [N, d], more than d + `num_sizes` of them.
        reference: as `fid`.
        num_sizes: points of the line, 2 or more.
        seed: of the draws.

    Raises:
        ValueError: as `fid`; too few pictures or sizes.
    """
    target, x = _statistics(reference), check_features(features)
    count, smallest = len(x), max(len(x) // 10, x.shape[1] + 1)
    if num_sizes < 2:
        raise ValueError(f"num_sizes must be 2 or more, got {num_sizes}")
    if count < smallest + num_sizes - 1:
        raise ValueError(f"{num_sizes} sizes need {smallest + num_sizes - 1} pictures or more, got {count}")
    root, rng = _root(target.cov), torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, count, num_sizes, dtype=torch.float64).round()
    drawn = [x[torch.randperm(count, generator=rng)[: int(size)]] for size in sizes]
    distances = torch.tensor([_distance(Statistics.of(part), target, root) for part in drawn], dtype=torch.float64)
    line = torch.stack((torch.ones_like(sizes), 1 / sizes), dim=1)
    return torch.linalg.lstsq(line, distances[:, None]).solution[0].item()


def fid_without(features: Tensor, reference: Reference | Statistics | Tensor, groups: Tensor) -> Tensor:
    """FID without each group of the generated pictures, for `grouped_interval`.

    Args:
        features: of the generated pictures [N, d].
        reference: as `fid`.
        groups: group of every picture [N], 0 to G - 1, none of them empty.

    Returns:
        [G] float64.

    Raises:
        ValueError: as `fid`.
    """
    target, x = _statistics(reference), check_features(features)
    if x.shape[1:] != target.mean.shape:
        raise _unequal(x.shape[1], len(target.mean))
    rooted, found = x @ _root(target.cov), []
    for group in range(int(groups.max()) + 1):
        part, y = (values[groups != group] for values in (x, rooted))
        means = (part.mean(dim=0) - target.mean).square().sum()
        shared = _singular_values(y - y.mean(dim=0)).sum() / (len(y) - 1) ** 0.5
        found.append(means + part.var(dim=0).sum() + target.cov.trace() - 2 * shared)
    return torch.stack(found).clamp(min=0)


def _statistics(reference: Reference | Statistics | Tensor) -> Statistics:
    if isinstance(reference, Reference):
        return reference.statistics
    return reference if isinstance(reference, Statistics) else Statistics.of(reference)


def _distance(a: Statistics, b: Statistics, root_b: Tensor) -> float:
    """(Σ_a Σ_b)^½ has the trace of (Σ_b^½ Σ_a Σ_b^½)^½, which is symmetric, so its eigenvalues are real."""
    if a.mean.shape != b.mean.shape:
        raise _unequal(len(a.mean), len(b.mean))
    means = (a.mean - b.mean).square().sum()
    shared = torch.linalg.eigvalsh(root_b @ a.cov @ root_b).clamp(min=0).sqrt().sum()
    return (means + a.cov.trace() + b.cov.trace() - 2 * shared).clamp(min=0).item()


def _singular_values(x: Tensor) -> Tensor:
    """Singular values of x [n, d], from the smaller of its two products with itself."""
    return torch.linalg.eigvalsh(x @ x.T if len(x) <= x.shape[1] else x.T @ x).clamp(min=0).sqrt()


def _unequal(one: int, other: int) -> ValueError:
    return ValueError(f"both sides need features of one extractor, got {one} and {other} features")


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root; rounding may have made the smallest eigenvalues negative."""
    values, vectors = torch.linalg.eigh(cov)
    _check_eigenvalues(values)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check_eigenvalues(values: Tensor) -> None:
    """Raise `ValueError` for eigenvalues of a covariance that are negative beyond rounding."""
    least, most = values.min().item(), values.abs().max().item()
    if least < -ROUNDING * most:
        raise ValueError(
            f"the covariance has eigenvalues from {least:.3g} to {values.max().item():.3g}: no covariance of "
            "pictures has any below 0, so these statistics are damaged"
        )
