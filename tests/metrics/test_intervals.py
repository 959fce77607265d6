"""Intervals of differences and the sign test: against formulas, tables and known truths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffattn.metrics import intervals
from diffattn.metrics.fid import fid, fid_without
from diffattn.metrics.intervals import (
    LEAST,
    SignTest,
    _t_quantile,
    grouped_interval,
    paired_interval,
    sign_test,
    unpaired_interval,
)
from diffattn.metrics.kid import kid, kid_without

RNG = torch.Generator


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=RNG().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 2.5706), (9, 2.2622), (19, 2.0930), (99, 1.9842), (10**6, 1.96)])
def test_quantiles_of_student_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert _t_quantile(degrees) == pytest.approx(quantile, rel=2e-3)


def test_signs_against_the_binomial_formula() -> None:
    nine = torch.tensor([1.0] * 9 + [-2.0])
    found = sign_test(nine)
    assert (found.positive, found.negative) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(-nine).p == pytest.approx(sign_test(nine).p)
    zeros = sign_test(torch.tensor([0.0, 0.0, 1.0, 1.0]))  # which have no sign
    assert (zeros.positive, zeros.negative, zeros.p) == (2, 0, pytest.approx(2 / 4))
    assert sign_test(torch.tensor([1.0, -1.0])).p == 1
    assert sign_test(torch.zeros(5)) == SignTest(0, 0, 1.0)
    assert 0 < sign_test(torch.ones(1000)).p < 1e-200


def test_an_interval_of_many_pairs_is_that_of_the_normal_distribution() -> None:
    x = 3 + 2 * normal(2000)
    low, high = paired_interval(x)
    half = 1.96 * x.std().item() / 2000**0.5
    assert (low, high) == pytest.approx((x.mean().item() - half, x.mean().item() + half), abs=0.1 * half)


def test_intervals_move_and_stretch_with_the_values() -> None:
    x = normal(30) ** 3
    low, high = paired_interval(x)
    assert paired_interval(5 + 2 * x) == pytest.approx((5 + 2 * low, 5 + 2 * high))
    assert paired_interval(x) == (low, high)  # the same draws
    assert paired_interval(torch.full((7,), 0.25)) == pytest.approx((0.25, 0.25))


def test_many_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(100)
    whole = paired_interval(x)
    monkeypatch.setattr(intervals, "ELEMENTS", 100 * 64)
    assert paired_interval(x) == pytest.approx(whole, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 20, 60])
def test_as_many_intervals_hold_the_truth_as_they_say(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    paired = [paired_interval(normal(count, seed=i)) for i in range(400)]
    apart = [unpaired_interval(1 + normal(count, seed=i), 3 + 2 * normal(count, seed=1000 + i)) for i in range(400)]
    assert 0.91 < sum(low <= 0 <= high for low, high in paired) / 400 < 0.99
    assert 0.91 < sum(low <= 2 <= high for low, high in apart) / 400 < 0.99


def test_pairs_show_what_apart_is_hidden() -> None:
    a = normal(50)
    b = a + 0.1 + 0.05 * normal(50, seed=1)
    low, high = paired_interval(b - a)
    assert 0.05 < low < high < 0.15
    low, high = unpaired_interval(a, b)
    assert low < 0 < high


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = normal(20)
    without = (x.sum() - x) / 19
    error = (x.var() / 20).item() ** 0.5
    low, high = grouped_interval(x.mean().item(), without)
    assert (high - low) / 2 == pytest.approx(_t_quantile(19) * error)
    assert (high + low) / 2 == pytest.approx(x.mean().item())
    assert grouped_interval(0, 7 + without) == pytest.approx(grouped_interval(0, without))
    wide = grouped_interval(0, without, variance=3 * error**2)
    assert wide[1] == pytest.approx(2 * _t_quantile(19) * error)


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased, pair by pair, but for the pairs within y."""
    within = [(a @ b / len(a) + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    across = [(a @ b / len(a) + 1) ** 3 for a in x for b in y]
    return (sum(within) / len(within) - 2 * sum(across) / len(across)).item()  # type: ignore[union-attr]


def test_figures_without_each_group_are_those_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.metrics.kid.ROWS", 4)  # several parts
    x, reference, groups = normal(13, 3), normal(9, 3, seed=1) + 0.3, torch.arange(13) % 6
    of_fid, of_kid = fid_without(x, reference, groups), kid_without(x, reference, groups)
    for group in range(6):
        kept = x[groups != group]
        assert of_fid[group].item() == pytest.approx(fid(kept, reference))
        assert of_kid[group].item() == pytest.approx(mmd(kept, reference))
    few, many = normal(8, 12), normal(20, 12, seed=1)  # fewer pictures than features
    for group, value in enumerate(fid_without(few, many, groups[:8])):
        assert value.item() == pytest.approx(fid(few[groups[:8] != group], many))
    with pytest.raises(ValueError, match="features of one extractor, got 12 and 3 features"):
        fid_without(few, reference, groups[:8])
    whole = kid(x[:9], reference, subsets=1, subset_size=9).mean  # all of both, with the pairs within the reference
    same = [(a @ b / 3 + 1) ** 3 for i, a in enumerate(reference) for j, b in enumerate(reference) if i != j]
    assert mmd(x[:9], reference) + (sum(same) / 72).item() == pytest.approx(whole)  # type: ignore[union-attr]


def covered(seeds: range, figure: Callable[[Tensor], float], without: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The share of intervals that hold the mean difference of two generators that share their seeds."""
    changes, found = [], []
    for seed in seeds:
        a = normal(80, 4, seed=seed)
        b = 1.1 * a + 0.2 * normal(80, 4, seed=1000 + seed)
        groups = torch.randperm(80, generator=RNG().manual_seed(seed)) % 20
        changes.append(figure(b) - figure(a))
        found.append(grouped_interval(changes[-1], without(b, groups) - without(a, groups)))
    truth = sum(changes) / len(changes)
    return sum(low <= truth <= high for low, high in found) / len(found)


@pytest.mark.slow
def test_intervals_of_fid_hold_the_truth_as_often_as_they_say() -> None:
    reference = normal(500, 4, seed=9999)
    found = covered(range(150), lambda x: fid(x, reference), lambda x, groups: fid_without(x, reference, groups))
    assert 0.9 < found < 0.995


@pytest.mark.parametrize("values", [torch.zeros(LEAST - 1), torch.zeros(2, 8), torch.tensor([1.0] * 8 + [torch.nan])])
def test_too_little_for_an_interval(values: Tensor) -> None:
    for make in (paired_interval, lambda x: unpaired_interval(x, torch.zeros(9)), lambda x: grouped_interval(0, x)):
        with pytest.raises(ValueError, match=f"{LEAST} values or more|NaN"):
            make(values)
