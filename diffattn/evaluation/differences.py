"""Whether two results differ by more than chance, that is, by more than other pictures of the same kind would."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from diffattn.evaluation.quality import QualityResult, compare
from diffattn.evaluation.spread import NUMBER, PER_PICTURE, WITHOUT_GROUP
from diffattn.metrics.intervals import (
    LEAST,
    LEVEL,
    Interval,
    SignTest,
    grouped_interval,
    paired_interval,
    sign_test,
    unpaired_interval,
)
from diffattn.tables import text_table

HIGHER_IS_BETTER = (
    "psnr", "foreground_psnr", "ssim", "clip_i", "dino_i", "clip", "pickscore", "precision", "recall", "accuracy",
)  # fmt: skip
LOWER_IS_BETTER = ("lpips", "latent_error", "fid", "kid", "fid_infinity", "sfid")
NO_FIGURES = ("kid_std",)  # spreads of scores, which are no scores themselves

NO_DIFFERENCE = "no difference shown"
UNKNOWN = "not known"
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)

Values = Mapping[int, float]
"""Number of a picture -> its score."""


@dataclass(frozen=True)
class Difference:
    """One score of two results, b against a.

    Attributes:
        a, b: the scores; means over the pictures that both have, where the interval is of pairs.
        change: b minus a.
        interval: 95 % interval of the change; None where the results contain too little.
        pairs: pictures that both results have, compared one by one; None for figures of whole sets.
        signs: in how many pairs b's score is higher and lower; None as `pairs`.
        why: why there is no interval; empty if there is one.
    """

    score: str
    a: float
    b: float
    change: float
    interval: Interval | None = None
    pairs: int | None = None
    signs: SignTest | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """`NO_DIFFERENCE` where the interval contains 0, `UNKNOWN` where there is none, otherwise how b compares."""
        if self.interval is None:
            return UNKNOWN
        low, high = self.interval
        if low <= 0 <= high:
            return NO_DIFFERENCE
        if self.score in HIGHER_IS_BETTER or self.score in LOWER_IS_BETTER:
            return "B better" if (low > 0) == (self.score in HIGHER_IS_BETTER) else "B worse"
        return "B higher" if low > 0 else "B lower"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict as JSON types."""
        return asdict(self) | {"verdict": self.verdict}


def differences(a: QualityResult, b: QualityResult, may_differ: Collection[str] = ()) -> list[Difference]:
    """The scores that both results have, each with an interval of its difference as far as the results allow.

    - Scores of single pictures, drawn from the same prompts and seeds: bootstrap over the pairs, and the sign test.
    - Drawn from different ones: bootstrap over the pictures of each.
    - FID, KID and sFID: the jackknife that leaves out the same twentieth of both sets at a time. It holds for other
      pictures of the same generators against the same reference. Without it, KID by its deviation over subsets.

    Args:
        may_differ: fields of the protocol that are being compared, as `compare` takes them.

    Raises:
        ValueError: as `compare`; details that are not what `evaluate` writes.
    """
    changes = compare(a, b, may_differ)
    return [_difference(name, a, b) for name in changes if name not in NO_FIGURES]


def difference_table(found: Sequence[Difference]) -> str:
    """A text table, one score per row."""
    head = ["score", "A", "B", "B - A", f"{LEVEL:.0%} interval", "pairs", "B higher", "sign test", "verdict"]
    return text_table(head, [_row(x) for x in found])


def _row(x: Difference) -> list[str]:
    interval = "" if x.interval is None else f"{x.interval[0]:+.4g} to {x.interval[1]:+.4g}"
    signs = ["", ""]
    if x.signs is not None:
        signs = [f"{x.signs.positive} of {x.signs.positive + x.signs.negative}", f"p = {x.signs.p:.2g}"]
    verdict = f"{x.verdict}: {x.why}" if x.why else x.verdict
    pairs = "" if x.pairs is None else str(x.pairs)
    return [x.score, f"{x.a:.5g}", f"{x.b:.5g}", f"{x.change:+.4g}", interval, pairs, *signs, verdict]


def _difference(name: str, a: QualityResult, b: QualityResult) -> Difference:
    plain = Difference(name, a.scores[name], b.scores[name], b.scores[name] - a.scores[name])
    one, other = _values(a, name), _values(b, name)
    if one is not None and other is not None:
        return _of_pairs(plain, one, other) if _same_pictures(a, b) else _of_samples(plain, one, other)
    return _of_sets(plain, a, b)


def _same_pictures(a: QualityResult, b: QualityResult) -> bool:
    """Whether pictures of one number have one prompt and one seed (of files: one prompt, or one partner)."""
    one, other = a.protocol, b.protocol
    first = [str(x.seeds).partition("..")[0] for x in (one, other)]  # of "0..999"
    return first[0] == first[1] and one.options.get("subjects") == other.options.get("subjects")


def _of_pairs(plain: Difference, one: Values, other: Values) -> Difference:
    shared = sorted(one.keys() & other.keys())
    if len(shared) < LEAST:
        return replace(plain, pairs=len(shared), why=f"{len(shared)} pairs, at least {LEAST} are needed")
    a, b = (torch.tensor([values[number] for number in shared], dtype=torch.float64) for values in (one, other))
    means = {"a": a.mean().item(), "b": b.mean().item(), "change": (b - a).mean().item()}
    return replace(plain, **means, interval=paired_interval(b - a), pairs=len(shared), signs=sign_test(b - a))


def _of_samples(plain: Difference, one: Values, other: Values) -> Difference:
    if min(len(one), len(other)) < LEAST:
        return replace(plain, why=f"{len(one)} and {len(other)} pictures, at least {LEAST} are needed")
    a, b = (torch.tensor(list(values.values()), dtype=torch.float64) for values in (one, other))
    return replace(plain, interval=unpaired_interval(a, b))


def _of_sets(plain: Difference, a: QualityResult, b: QualityResult) -> Difference:
    kid = plain.score == "kid"
    one, other = _changes(a, plain.score), _changes(b, plain.score)
    if one is not None and other is not None and len(one) == len(other) >= LEAST:
        variance = _of_draws(a) + _of_draws(b) if kid else 0.0
        return replace(plain, interval=grouped_interval(plain.change, other - one, variance))
    if kid and (variance := _of_subsets(a) + _of_subsets(b)) < math.inf:
        half = NORMAL * (variance + _of_draws(a) + _of_draws(b)) ** 0.5
        return replace(plain, interval=(plain.change - half, plain.change + half))
    return replace(plain, why="the results contain nothing about its variation")


def _of_draws(result: QualityResult) -> float:
    """Variance of KID due to drawing only some of the subsets."""
    return result.scores.get("kid_std", 0.0) ** 2 / (result.protocol.options.get("kid_subsets") or 1)


def _of_subsets(result: QualityResult) -> float:
    """Variance of KID for other pictures, from its deviation over subsets; infinite where that says nothing.

    Subsets of m of n pictures are the jackknife that leaves out n - m (Efron & Tibshirani 1993, section 11.7), whose
    factor is m / (n - m). With n the smaller of both sets it is no less than the variance.
    """
    protocol = result.protocol
    count = min(protocol.num_pictures, protocol.reference_pictures or protocol.num_pictures)
    size = protocol.options.get("kid_subset_size", count)
    left = count - size
    return result.scores.get("kid_std", math.inf) ** 2 * size / left if left > 0 else math.inf


def _values(result: QualityResult, name: str) -> Values | None:
    """The known values of a score by number; None if the result has none by picture."""
    held = result.details.get(PER_PICTURE)
    if not isinstance(held, Mapping) or name not in held:
        return None
    numbers: Any = held.get(NUMBER)
    values: Any = held[name]
    if not (_is_list(numbers, int) and _is_list(values, int | float | None) and len(numbers) == len(values)):
        raise ValueError(f"not a quality result: the values by picture of {name!r} are damaged")
    return {number: value for number, value in zip(numbers, values, strict=True) if value is not None}


def _changes(result: QualityResult, name: str) -> Tensor | None:
    """How much a score changes without each of the groups [G]; None if the result does not say."""
    held = result.details.get(WITHOUT_GROUP)
    if not isinstance(held, Mapping) or name not in held:
        return None
    if not _is_list(held[name], int | float):
        raise ValueError(f"not a quality result: the values by group of {name!r} are damaged")
    return torch.tensor(held[name], dtype=torch.float64)


def _is_list(x: Any, kind: Any) -> bool:
    return isinstance(x, list) and all(isinstance(part, kind) for part in x)
