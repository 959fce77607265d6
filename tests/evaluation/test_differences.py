"""Whether two results differ: judged from pairs, from samples, from whole sets, and from nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_metrics import random_pictures
from torch import Tensor

from diffattn.evaluation import EvaluateConfig, evaluate
from diffattn.evaluation.differences import NO_DIFFERENCE, UNKNOWN, Difference, difference_table, differences
from diffattn.evaluation.quality import Protocol, QualityResult
from diffattn.evaluation.spread import per_picture
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor
from diffattn.metrics.intervals import paired_interval, sign_test

PROTOCOL = Protocol(
    num_pictures=20, reference="none", reference_hash="", reference_pictures=None, extractor="none", extractor_hash="",
    resize="", sampler="DDIM", steps=4, guidance=1.0, seeds="0..19", dtype="float32", device="cpu",
    options={"subjects": "abc"},
)  # fmt: skip


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result(values: Mapping[str, Tensor], numbers: Sequence[int] | None = None, **changes: Any) -> QualityResult:
    """With these values by picture, as `evaluate` writes them."""
    scores = {name: x[x.isfinite()].mean().item() for name, x in values.items()}
    count = len(next(iter(values.values())))
    details = {"per_picture": per_picture(values, numbers or range(count))}
    return QualityResult("x", replace(PROTOCOL, **changes), scores, json.loads(json.dumps(details)))


def only(found: Sequence[Difference]) -> Difference:
    (one,) = found
    return one


def test_pairs_are_compared_one_by_one() -> None:
    a, change = 20 + 5 * normal(20), 0.2 + 0.1 * normal(20, 1)
    found = only(differences(result({"psnr": a}), result({"psnr": a + change})))
    means = [x.mean().item() for x in (a, a + change, change)]
    assert [found.a, found.b, found.change] == pytest.approx(means, abs=1e-5)
    assert found.interval == pytest.approx(paired_interval(change), abs=1e-5)
    signs = sign_test(change)
    assert (found.pairs, found.signs) == (20, signs)
    assert signs.positive >= 18
    assert found.verdict == "B better"
    assert only(differences(result({"lpips": a}), result({"lpips": a + change}))).verdict == "B worse"
    assert only(differences(result({"psnr": a + change}), result({"psnr": a}))).verdict == "B worse"
    assert only(differences(result({"own": a}), result({"own": a + change}))).verdict == "B higher"


def test_what_lies_within_the_interval_is_no_difference() -> None:
    a = 20 + normal(20)
    found = only(differences(result({"ssim": a}), result({"ssim": a + normal(20, 3)})))
    assert found.interval is not None
    assert found.interval[0] < 0 < found.interval[1]
    assert found.verdict == NO_DIFFERENCE
    assert only(differences(result({"ssim": a}), result({"ssim": a}))).verdict == NO_DIFFERENCE
    assert NO_DIFFERENCE in difference_table([found])


def test_only_pictures_that_both_have_are_pairs() -> None:
    a = torch.arange(20.0)
    b = a.clone() + 1
    b[3], b[4] = torch.inf, torch.nan
    left_out = result({"psnr": b[:18]}, [*range(18)])
    assert left_out.details["per_picture"]["psnr"][3:5] == [None, None]
    found = only(differences(result({"psnr": a}), left_out))
    assert found.pairs == 16
    assert found.change == pytest.approx(1)
    assert found.a == pytest.approx((sum(range(18)) - 7) / 16)


def test_other_seeds_or_prompts_are_no_pairs() -> None:
    a, b = normal(20), 0.3 + normal(20)
    same = only(differences(result({"clip": a}), result({"clip": b})))
    assert same.verdict == "B better"
    changes: list[dict[str, Any]] = [{"seeds": "20..39"}, {"options": {"subjects": "other"}}]
    for change in changes:
        found = only(differences(result({"clip": a}), result({"clip": b}, **change), [*change]))
        assert (found.pairs, found.signs) == (None, None)
        assert found.interval is not None
        assert found.interval[0] < 0 < 0.3 < found.interval[1]
        assert found.verdict == NO_DIFFERENCE
    more = only(differences(result({"clip": a}), result({"clip": b[:15]}, seeds="0..14"), ["seeds"]))
    assert (more.pairs, more.verdict) == (15, "B better")  # the first 15 are the same
    far = only(differences(result({"clip": a}), result({"clip": b + 9}, seeds="20..39"), ["seeds"]))
    assert far.verdict == "B better"


def test_too_few_pictures_show_nothing() -> None:
    few = result({"psnr": torch.arange(5.0)})
    found = only(differences(few, result({"psnr": 9 + torch.arange(5.0)})))
    assert (found.verdict, found.interval) == (UNKNOWN, None)
    assert "5 pairs, at least 6 are needed" in difference_table([found])
    apart = only(differences(few, replace(few, protocol=replace(few.protocol, seeds="5..9")), ["seeds"]))
    assert "5 and 5 pictures, at least 6" in apart.why


def test_figures_of_sets_without_anything_to_tell_from() -> None:
    a, b = (QualityResult("x", PROTOCOL, {"fid": x, "kid": x, "recall": x}) for x in (1.0, 2.0))
    assert {x.score: x.verdict for x in differences(a, b)} == dict.fromkeys(("fid", "kid", "recall"), UNKNOWN)


def test_kid_by_its_deviation_over_subsets() -> None:
    """Halves: the deviation over subsets is that of the whole; smaller subsets deviate more."""
    wide = {"kid_subsets": 100, "kid_subset_size": 10}
    protocol = replace(PROTOCOL, reference_pictures=1000, options=wide)

    def found(a: float, b: float, **changes: Any) -> Difference:
        one, other = (QualityResult("x", replace(protocol, **changes), {"kid": x, "kid_std": 0.1}) for x in (a, b))
        return only(differences(one, other))

    half = 1.96 * (2 * 0.1**2 * 1.01) ** 0.5
    assert found(1.0, 1.2).interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
    assert found(1.0, 1.2).verdict == NO_DIFFERENCE
    assert found(1.0, 1.5).verdict == "B worse"
    assert found(1.0, 1.2, num_pictures=110, options=wide).verdict == "B worse"
    assert found(1.0, 9.0, num_pictures=10).verdict == UNKNOWN  # all subsets are the same pictures


pictures = partial(random_pictures, size=16)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QualityResult]:
    """Results of one set; of it, hardly changed; of another of its kind; and darkened."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("sets")
    config = EvaluateConfig(OfflineExtractor("cifar-classifier", Classifier(5, 16, (6, 8, 10), 8, "CIFAR-10").eval()))
    write_pictures(place / "reference.npz", pictures(60, seed=1))
    plain, nearly = pictures(40, seed=2), pictures(40, seed=2)
    nearly[:, :, 0, 0] = 0
    found = {"plain": plain, "nearly": nearly, "other": pictures(40, seed=3), "dark": plain // 2}
    for name, x in found.items():
        write_pictures(place / f"{name}.npz", x)
    return {
        name: evaluate(place / f"{name}.npz", place / "reference.npz", folder=place / name, config=config)
        for name in found
    }


@pytest.mark.slow
def test_sets_are_told_apart_by_leaving_groups_out(sets: dict[str, QualityResult]) -> None:
    def of(b: str) -> dict[str, Difference]:
        return {x.score: x for x in differences(sets["plain"], sets[b])}

    other, dark, nearly = of("other"), of("dark"), of("nearly")
    assert set(sets["plain"].details["without_group"]) == {"fid", "kid", "sfid"}
    assert len(sets["plain"].details["without_group"]["fid"]) == 20
    for name in ("fid", "kid", "sfid"):
        assert other[name].verdict == NO_DIFFERENCE
        assert dark[name].verdict == "B worse"

    def width(x: Difference) -> float:
        assert x.interval is not None
        return x.interval[1] - x.interval[0]

    assert width(nearly["fid"]) < width(other["fid"]) / 3  # what both sets share cancels
    assert other["recall"].verdict == UNKNOWN
    assert "kid_std" not in other


def test_damaged_details_are_refused(tmp_path: Path, sets: dict[str, QualityResult]) -> None:
    a = result({"psnr": normal(8)})
    for damage in ({"number": [1], "psnr": [1.0, 2.0]}, {"psnr": [1.0]}, {"number": ["x"], "psnr": [1.0]},
                   {"number": [0], "psnr": ["x"]}, {"number": 3, "psnr": 4}):  # fmt: skip
        with pytest.raises(ValueError, match="not a quality result: the values by picture of 'psnr'"):
            differences(a, replace(a, details={"per_picture": damage}))
    broken = replace(sets["plain"], details={"without_group": {"fid": "many"}})
    with pytest.raises(ValueError, match="not a quality result: the values by group of 'fid'"):
        differences(broken, broken)
