"""FID, KID, FID∞, precision and recall, references and protocols: closed forms, fixture, properties, errors."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_metrics import random_pictures
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffattn.evaluation.quality import Protocol, QualityResult, compare, quality
from diffattn.metrics import adm
from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor
from diffattn.metrics.features import features_of
from diffattn.metrics.fid import fid, fid_infinity, frechet_distance
from diffattn.metrics.kid import kid
from diffattn.metrics.precision_recall import precision_recall
from diffattn.metrics.reference import Reference, Statistics

FIXTURE = load_file(Path(__file__).parents[1] / "fixtures" / "fid_kid_300x16.safetensors")
ONE, TWO = FIXTURE["in.features_1"], FIXTURE["in.features_2"]


def normal(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


class Same(torch.nn.Module):
    """Features are their own features, for torchmetrics."""

    num_features = ONE.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


def reference_of(features: Tensor, name: str = "set") -> Reference:
    return Reference(name, "ab", "cifar-classifier", "cd", "bilinear", Statistics.of(features), features)


# FID


def test_fid_equals_the_fixture() -> None:
    for expected in ("out.frechet_torchmetrics.f64", "out.frechet_scipy_sqrtm.f64"):
        assert fid(TWO, ONE) == pytest.approx(FIXTURE[expected].item(), rel=1e-9, abs=1e-8)
    assert fid(ONE, TWO) == pytest.approx(fid(TWO, ONE), rel=1e-9)


def test_fid_equals_torchmetrics() -> None:
    metric = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    metric.update(ONE.double(), real=True)
    metric.update(TWO.double(), real=False)
    assert fid(TWO, ONE) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_closed_forms() -> None:
    """Commuting covariances: ‖Δμ‖² + Σ (σ_a − σ_b)²."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.5]).double()
    turn = torch.linalg.qr(normal(3, 3).double()).Q
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    one = Statistics(torch.zeros(3).double(), turn @ a.diag() @ turn.T, 100)
    two = Statistics(shift, turn @ b.diag() @ turn.T, 100)
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(one, two) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(two, one) == pytest.approx(expected.item(), rel=1e-12)


def test_a_set_is_at_no_distance_from_itself_even_if_its_covariance_is_singular() -> None:
    few = normal(5, 32)
    assert fid(few, few) == pytest.approx(0, abs=1e-6)
    assert fid(few, few + 3) == pytest.approx(32 * 9, rel=1e-6)
    assert fid(few[:, :1], few[:, :1]) == pytest.approx(0, abs=1e-6)


def test_fid_does_not_depend_on_rotation_or_order() -> None:
    turn = torch.linalg.qr(normal(16, 16).double()).Q
    shuffled = TWO[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert fid(shuffled.double() @ turn, ONE.double() @ turn) == pytest.approx(fid(TWO, ONE), rel=1e-9)


def test_fid_infinity_takes_the_bias_of_few_pictures_away() -> None:
    reference = Statistics(torch.zeros(16).double(), torch.eye(16).double(), None)  # of the distribution itself
    few = normal(600, 16)
    biased, limit = fid(few, reference), fid_infinity(few, reference)
    assert biased > 0.1
    assert abs(limit) < biased / 3
    assert fid_infinity(few, reference) == pytest.approx(limit, rel=1e-9)  # LAPACK rounds by where memory lies
    assert fid_infinity(few, reference, seed=1) != pytest.approx(limit, rel=1e-3)


def test_statistics_are_unbiased() -> None:
    found = Statistics.of(ONE)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(ONE.double().numpy(), rowvar=False), rtol=1e-12)
    assert found.count == 300
    assert found.mean.dtype == torch.float64


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", [fid, kid, precision_recall, fid_infinity])
def test_features_that_cannot_be_measured(metric) -> None:
    with pytest.raises(ValueError, match=r"at least \d+ pictures are needed, got 1"):
        metric(ONE[:1], TWO)
    broken = ONE.clone()
    broken[3, 2] = torch.nan
    for pair in ((broken, TWO), (TWO, broken)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            metric(*pair)
    with pytest.raises(ValueError, match="one extractor, got 8 and 16 features"):
        metric(ONE[:, :8], TWO)
    with pytest.raises(ValueError, match=r"\[N, d\], got \[16\]"):
        metric(ONE[0], TWO)


EYE = torch.eye(4).double()
DAMAGED = {
    "negative definite": (-EYE, "eigenvalues from -1 to -1"),
    "indefinite": (torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])).double(), "eigenvalues from -0.1 to 1"),
    "asymmetric": (EYE + torch.tensor([[0.0, 0.5, 0, 0]] + [[0.0] * 4] * 3).double(), "not symmetric.*up to 0.5"),
    "NaN": (EYE * torch.nan, "covariance contains values that are NaN"),
    "infinite": (EYE * torch.inf, "covariance contains values that are NaN or infinite"),
    "not square": (EYE[:3], r"\[d, d\], got \[4\] and \[3, 4\]"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_covariance_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    cov, message = DAMAGED[kind]
    features, sound = normal(20, 4), Statistics.of(normal(20, 4))
    for distance in (
        lambda bad: fid(features, bad),
        lambda bad: fid_infinity(features, bad),
        lambda bad: frechet_distance(sound, bad),
        lambda bad: frechet_distance(bad, sound),
    ):
        with pytest.raises(ValueError, match=message):
            distance(Statistics(torch.zeros(4).double(), cov, None))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=cov.numpy())
    with pytest.raises(ValueError, match=message):
        fid(features, adm.read_statistics(tmp_path / "bad.npz"))


def test_statistics_stored_in_float32_are_sound() -> None:
    few = normal(40, 64)  # a singular covariance: rounding makes some of its eigenvalues negative
    exact = Statistics.of(few)
    rounded = Statistics(exact.mean.float().double(), exact.cov.float().double(), 40)
    assert torch.linalg.eigvalsh(rounded.cov).min() < 0
    assert fid(normal(50, 64), rounded) == pytest.approx(fid(normal(50, 64), exact), rel=1e-3)


def test_fid_infinity_needs_more_pictures_than_features() -> None:
    with pytest.raises(ValueError, match="15 sizes need 31 pictures or more, got 30"):
        fid_infinity(ONE[:30], TWO)
    assert math.isfinite(fid_infinity(ONE[:31], TWO))
    with pytest.raises(ValueError, match="num_sizes must be 2 or more, got 1"):
        fid_infinity(ONE, TWO, num_sizes=1)


# KID


def test_kid_of_whole_sets_equals_the_fixture() -> None:
    found = kid(TWO, ONE, subsets=1, subset_size=300)
    assert found.mean == pytest.approx(FIXTURE["out.kid_poly_mmd.f64"].item(), rel=1e-9, abs=1e-8)
    assert found.std == 0


def test_kid_equals_torchmetrics_on_its_own_draws() -> None:
    metric = KernelInceptionDistance(feature=Same(), subsets=7, subset_size=50)
    metric.update(ONE.double(), real=True)
    metric.update(TWO.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, std = metric.compute()
    found = kid(TWO, ONE, subsets=7, subset_size=50, seed=5)
    assert (found.mean, found.std) == pytest.approx((mean.item(), std.item()), rel=1e-5)


def test_kid_is_unbiased_and_its_draws_are_its_own() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = normal(200, 8), normal(250, 8, seed=1)
    found = kid(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(found.mean) < found.std
    assert (found.subsets, found.subset_size) == (100, 100)
    assert kid(a, b, subsets=5) == kid(a, b, subsets=5)
    assert kid(a, b, subsets=5) != kid(a, b, subsets=5, seed=1)


def test_kid_by_hand() -> None:
    """Two pictures a side: no diagonal among equals, all four pairs across."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    kernel = lambda a, b: (a * b + 1) ** 3  # noqa: E731
    expected = kernel(1, 2) + kernel(0, 3) - (kernel(1, 0) + kernel(1, 3) + kernel(2, 0) + kernel(2, 3)) / 2
    assert kid(x, y, subsets=3).mean == pytest.approx(expected)


def test_kid_refuses_sizes_and_references_it_cannot_draw_from() -> None:
    with pytest.raises(ValueError, match=r"subset_size must be 2 to 300.* got 301"):
        kid(ONE, TWO, subset_size=301)
    with pytest.raises(ValueError, match=r"subset_size .* got 1"):
        kid(ONE, TWO, subset_size=1)
    with pytest.raises(ValueError, match="subsets must be 1 or more, got 0"):
        kid(ONE, TWO, subsets=0)
    with pytest.raises(ValueError, match="reference 'set' contains mean and covariance only"):
        kid(ONE, replace(reference_of(TWO), features=None))


# Precision and recall


def test_precision_and_recall_by_hand() -> None:
    """On a line, k = 1: real balls are [0, 1] around 0 and 1 and [7, 13] around 10."""
    real = torch.tensor([[0.0], [1.0], [4.0]])  # radii 1, 1, 3
    fake = torch.tensor([[0.5], [6.5], [7.5], [30.0]])  # radii 6, 1, 1, 22.5
    assert precision_recall(fake, real, neighbours=1) == pytest.approx((2 / 4, 3 / 3))
    assert precision_recall(real, fake, neighbours=1) == pytest.approx((3 / 3, 2 / 4))


def test_precision_and_recall_of_equal_and_of_distant_sets() -> None:
    assert precision_recall(ONE, ONE) == (1, 1)
    assert precision_recall(ONE + 1000, ONE) == (0, 0)
    narrow = normal(200, 4) / 5
    precision, recall = precision_recall(narrow, normal(200, 4, seed=1))
    assert precision > 0.9
    assert recall < 0.5


def test_precision_and_recall_refuse_too_few_neighbours() -> None:
    with pytest.raises(ValueError, match="at least 4 pictures are needed, got 3"):
        precision_recall(ONE[:3], TWO)
    with pytest.raises(ValueError, match="neighbours must be 1 or more, got 0"):
        precision_recall(ONE, TWO, neighbours=0)


# References


@pytest.fixture(scope="module")
def extractor() -> OfflineExtractor:
    torch.manual_seed(0)
    return OfflineExtractor("cifar-classifier", Classifier(3, 8, (4, 6, 8), 5, "CIFAR-10"))


pictures = partial(random_pictures, size=8)


def test_a_reference_knows_its_pictures_however_they_are_cut(extractor: OfflineExtractor) -> None:
    x = pictures(12)
    whole, parts = Reference.of("noise", [x], extractor), Reference.of("noise", x.split(5), extractor)
    assert whole.hash == parts.hash
    assert whole.hash != Reference.of("noise", [x.flip(0)], extractor).hash
    assert whole.statistics.count == 12
    torch.testing.assert_close(whole.features, features_of([x], extractor))
    assert parts.features is not None
    assert fid(parts.features, whole) == pytest.approx(0, abs=1e-6)


def test_a_reference_survives_its_file(extractor: OfflineExtractor, tmp_path: Path) -> None:
    made = Reference.of("noise", [pictures(12)], extractor)
    made.save(tmp_path / "new" / "noise.safetensors")
    found = Reference.load(tmp_path / "new" / "noise.safetensors")
    for label in ("name", "hash", "extractor", "extractor_hash", "resize"):
        assert getattr(found, label) == getattr(made, label)
    assert torch.equal(found.statistics.cov, made.statistics.cov)
    assert found.features is not None
    assert made.features is not None
    assert torch.equal(found.features, made.features)
    assert found.statistics.count == 12
    made.save(tmp_path / "small.safetensors", features=False)
    small = Reference.load(tmp_path / "small.safetensors")
    assert small.features is None
    other = features_of([pictures(20, seed=1)], extractor)
    assert fid(other, small) == pytest.approx(fid(other, made), rel=1e-9)
    assert {p.name for p in tmp_path.iterdir()} == {"new", "small.safetensors"}


def test_what_is_no_reference_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}' is not a reference saved by diffattn"):
            Reference.load(tmp_path / name)


def test_adm_statistics(tmp_path: Path) -> None:
    path = tmp_path / "cifar.npz"
    adm.write_statistics(path, Statistics.of(ONE))
    found = adm.read_statistics(path)
    assert (found.name, found.extractor, found.features, found.statistics.count) == ("cifar", "inception", None, None)
    assert len(found.hash) == 64
    assert fid(TWO, found) == pytest.approx(fid(TWO, ONE), rel=1e-12)
    np.savez(path, mu=np.zeros(3, np.float32), sigma=np.eye(3))
    found = adm.read_statistics(path, "dinov2", "ef", "bicubic", count=7)
    assert (found.extractor, found.extractor_hash, found.resize, found.statistics.count) == (
        "dinov2",
        "ef",
        "bicubic",
        7,
    )
    assert found.statistics.mean.dtype == torch.float64


def test_adm_pictures(tmp_path: Path) -> None:
    path, x = tmp_path / "samples.npz", pictures(4)
    adm.write_pictures(path, x, torch.arange(4))
    assert np.load(path)["arr_0"].shape == (4, 8, 8, 3)
    assert np.load(path)["arr_1"].tolist() == [0, 1, 2, 3]
    assert torch.equal(adm.read_pictures(path), x)
    with pytest.raises(ValueError, match="as many labels as pictures, got 3 and 4"):
        adm.write_pictures(path, x, torch.arange(3))


def test_bad_npz_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"bad.npz' is not a readable .npz file"):
        adm.read_statistics(path)
    np.savez(path, mu=np.zeros(3), arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"bad.npz' is of another layout: it has no sigma, but mu, arr_0"):
        adm.read_statistics(path)
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], got float64"):
        adm.read_pictures(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"sigma \[d, d\], got \[3\] and \[2, 2\]"):
        adm.read_statistics(path)
    np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        adm.read_statistics(path)
    np.savez(path, arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"bad.npz' is not a readable .npz file: Object arrays"):
        adm.read_pictures(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one.npy' is not a readable .npz file"):
        adm.read_pictures(tmp_path / "one.npy")


# Protocols


def protocol_of(reference: Reference, extractor: OfflineExtractor, steps: int = 50) -> Protocol:
    return Protocol.of(
        100, reference, extractor, sampler="Euler", steps=steps, guidance=1.5, seeds="0..99", dtype=torch.float32,
        device="cpu", options={"kid_subsets": 10},
    )  # fmt: skip


def test_a_protocol_says_all_that_a_figure_depends_on(extractor: OfflineExtractor) -> None:
    reference = Reference.of("noise", [pictures(12)], extractor)
    found = protocol_of(reference, extractor)
    assert found.reference_hash == reference.hash
    assert found.extractor_hash == extractor.hash
    assert (found.dtype, found.device, found.reference_pictures) == ("float32", "cpu", 12)
    assert {"torch", "diffusers", "torchmetrics", "diffattn"} <= set(found.versions)
    result = QualityResult("softmax", found, {"fid": 3.0})
    assert result.label == "FID-100 (cifar-classifier, noise)"
    assert QualityResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with pytest.raises(ValueError, match=r"not a quality result: .*'scores'"):
        QualityResult.from_dict({"subject": "x", "protocol": result.to_dict()["protocol"]})


def test_results_of_one_protocol_compare_and_others_do_not(extractor: OfflineExtractor) -> None:
    protocol = protocol_of(Reference.of("noise", [pictures(12)], extractor), extractor)
    softmax = QualityResult("softmax", protocol, {"fid": 3.0, "kid": 0.5})
    mediator = QualityResult("mediator", protocol, {"fid": 2.0, "recall": 0.5})
    assert compare(softmax, mediator) == {"fid": -1.0}
    fewer = replace(mediator, protocol=replace(protocol, steps=25, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"'softmax' and 'mediator' .* steps: 50 and 25; dtype: 'float32' and"):
        compare(softmax, fewer)
    with pytest.raises(ValueError, match="differ in dtype: "):
        compare(softmax, fewer, may_differ=("steps",))
    assert compare(softmax, fewer, may_differ=("steps", "dtype")) == {"fid": -1.0}
    with pytest.raises(ValueError, match="the protocol has no speed"):
        compare(softmax, fewer, may_differ=("speed",))


def test_a_reference_of_another_extractor_is_refused(extractor: OfflineExtractor) -> None:
    reference = Reference.of("noise", [pictures(12)], extractor)
    torch.manual_seed(1)
    other = OfflineExtractor("cifar-classifier", Classifier(3, 8, (4, 6, 8), 5, "CIFAR-10"))
    with pytest.raises(ValueError, match=r"reference 'noise' was made with 'cifar-classifier' .* not with"):
        protocol_of(reference, other)
    with pytest.raises(ValueError, match="made with 'inception'"):
        protocol_of(replace(reference, extractor="inception", extractor_hash=""), extractor)


def test_quality_is_the_single_metrics() -> None:
    scores, options = quality(TWO, reference_of(ONE), kid_subsets=5, infinity=True)
    distance = kid(TWO, ONE, subsets=5)
    assert scores["fid"] == pytest.approx(fid(TWO, ONE), rel=1e-9)
    assert (scores["kid"], scores["kid_std"]) == pytest.approx((distance.mean, distance.std), rel=1e-9)
    assert (scores["precision"], scores["recall"]) == precision_recall(TWO, ONE)
    assert scores["fid_infinity"] == pytest.approx(fid_infinity(TWO, ONE), rel=1e-9)
    assert options == {"kid_subsets": 5, "kid_subset_size": 150, "neighbours": 3, "metric_seed": 0}
    assert "fid_infinity" not in quality(TWO, reference_of(ONE), kid_subsets=1)[0]
