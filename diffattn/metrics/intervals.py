"""Whether two sets of scores differ: 95 % intervals of a difference, and the sign test.

Shapes: n pictures (or pairs of pictures), G groups of them, R resamples.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
LEAST = 6  # pictures, or groups: with fewer, not even signs that all agree have a p below 1 - LEVEL
RESAMPLES = 5000
ELEMENTS = 2**22  # drawn at a time

Interval = tuple[float, float]


@dataclass(frozen=True)
class SignTest:
    """Signs of the differences of pairs, and the two-sided p of so uneven a split if both are equally likely."""

    positive: int
    negative: int
    p: float


def paired_interval(differences: Tensor, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of differences [n] of pairs (Efron & Tibshirani 1993, chapter 13).

    Pairs are drawn n at a time with replacement. For small n such intervals are too narrow; they are widened by the
    ratio of Student's t to the normal distribution, as Hesterberg (2015, section 3.4) expands them.

    Args:
        differences: finite, `LEAST` or more.
        seed: of the draws.

    Raises:
        ValueError: fewer, another shape, or values that are NaN or infinite.
    """
    x = _checked(differences)
    return _around(x.mean(), _resampled(x, seed))


def unpaired_interval(a: Tensor, b: Tensor, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of b [n] minus that of a [m], drawn apart; otherwise as `paired_interval`."""
    x, y = _checked(a), _checked(b)
    return _around(y.mean() - x.mean(), _resampled(y, seed + 1) - _resampled(x, seed))


def grouped_interval(change: float, without: Tensor, variance: float = 0.0) -> Interval:
    """Interval of a figure of many pictures, by the jackknife that leaves out one group at a time.

    The variance is (G-1)/G · Σ (x_g - x̄)² (Efron & Tibshirani 1993, eq. 11.5), with Student's t of G - 1 degrees.

    Args:
        change: the figure, such as a difference of two FIDs.
        without: the figure without each of the groups [G], or that minus any constant; `LEAST` groups or more.
        variance: added to that of the jackknife.

    Raises:
        ValueError: fewer groups, another shape, or values that are NaN or infinite.
    """
    x = _checked(without)
    error = ((len(x) - 1) * x.var(correction=0).item() + variance) ** 0.5
    half = _t_quantile(len(x) - 1) * error
    return change - half, change + half


def sign_test(differences: Tensor) -> SignTest:
    """The exact two-sided sign test of differences [n]; those that are 0 have no sign and do not count."""
    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    total, least = positive + negative, min(positive, negative)
    k = torch.arange(least + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(total + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1)
    tail = torch.logsumexp(ways - torch.lgamma(total - k + 1), dim=0) - total * math.log(2)
    return SignTest(positive, negative, min(1.0, 2 * tail.exp().item()))


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 1 or len(x) < LEAST:
        raise ValueError(f"an interval needs {LEAST} values or more, got {list(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("an interval needs values that are neither NaN nor infinite")
    return x.double()


def _resampled(x: Tensor, seed: int) -> Tensor:
    """How far the means of resamples are from that of x [n], widened for small n: [R]."""
    count, rng = len(x), torch.Generator().manual_seed(seed)
    rows = max(1, ELEMENTS // count)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = torch.cat([x[torch.randint(count, (size, count), generator=rng)].mean(dim=1) for size in sizes])
    widened = _t_quantile(count - 1) / _normal_quantile() * (count / (count - 1)) ** 0.5
    return (means - x.mean()) * widened


def _around(middle: Tensor, deviations: Tensor) -> Interval:
    low, high = (middle + deviations.quantile(deviations.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))).tolist()
    return low, high


def _normal_quantile() -> float:
    return NormalDist().inv_cdf((1 + LEVEL) / 2)


def _t_quantile(degrees: int) -> float:
    """Quantile of Student's t (Abramowitz & Stegun 26.7.5), within 0.2 % from 5 degrees of freedom on."""
    z, v = _normal_quantile(), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))
