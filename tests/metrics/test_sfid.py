"""Spatial features and sFID: which layer, in which order, and the Fréchet distance between them."""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny_metrics import fresh_inception, random_pictures, tiny_extractor
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import Dinov2Config, Dinov2Model

from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import FeatureExtractor, OfflineExtractor, load_extractor
from diffattn.metrics.fid import frechet_distance
from diffattn.metrics.reference import Statistics
from diffattn.metrics.sfid import both_features, read_spatial_statistics, spatial_layer


@pytest.fixture(scope="module")
def extractor() -> OfflineExtractor:
    return tiny_extractor(32)


pictures = partial(random_pictures, size=32)


def by_hand(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """The first 7 channels of the second stage on a grid of 8x8, the channel last."""
    model = extractor.model
    with torch.no_grad():
        x = model.stem(images.float() / 127.5 - 1)  # type: ignore[operator]
        x = model.stages[:4](torch.cat((x.relu(), (-x).relu()), dim=1))  # type: ignore[index]
    return F.adaptive_avg_pool2d(x[:, :7], 8).permute(0, 2, 3, 1).flatten(1)


def test_both_features_in_one_pass(extractor: OfflineExtractor) -> None:
    x = pictures(3)
    pooled, spatial = both_features(extractor, x)
    assert spatial is not None
    torch.testing.assert_close(pooled, extractor(x))
    assert spatial.shape == (3, 7 * 8 * 8)
    torch.testing.assert_close(spatial, by_hand(extractor, x))
    assert not extractor.model.stages[3]._forward_hooks  # type: ignore[index]


class Spatial(nn.Module):
    """The spatial features alone, for torchmetrics."""

    num_features = 7 * 8 * 8

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        return by_hand(self.extractor, x)


def test_sfid_equals_torchmetrics(extractor: OfflineExtractor) -> None:
    real, fake = pictures(30), pictures(25, seed=1) // 2
    metric = FrechetInceptionDistance(feature=Spatial(extractor))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    sides = [Statistics.of(torch.as_tensor(both_features(extractor, x)[1])) for x in (fake, real)]
    assert frechet_distance(*sides) == pytest.approx(metric.compute().item(), rel=1e-3)


def test_it_sees_where_things_are(extractor: OfflineExtractor) -> None:
    left = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    left[..., :8] = 0
    (_, a), (_, b) = both_features(extractor, left), both_features(extractor, left.flip(3))
    assert a is not None
    assert b is not None
    assert not torch.allclose(a, b)


def test_extractors_without_a_map_have_none(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)
    Dinov2Model(config).save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", tmp_path)
    assert spatial_layer(extractor) is None
    pooled, spatial = both_features(extractor, pictures(2, size=16))
    assert pooled.shape == (2, 16)
    assert spatial is None


def test_features_that_are_not_finite_are_refused() -> None:
    broken = OfflineExtractor("cifar-classifier", Classifier(5, 32, (6, 8, 10), 8, "CIFAR-10"))
    broken.model.stages[2][0].weight.data.fill_(torch.nan)  # type: ignore[index]
    with pytest.raises(ValueError, match="'cifar-classifier' gave features that are NaN"):
        both_features(broken, pictures(1))


def test_statistics_of_adm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held = {"mu": rng.normal(size=4), "sigma": np.eye(4), "mu_s": rng.normal(size=3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "both.npz", **held)
    found = read_spatial_statistics(tmp_path / "both.npz")
    assert found is not None
    torch.testing.assert_close(found.mean, torch.from_numpy(held["mu_s"]))
    assert found.cov.shape == (3, 3)
    np.savez(tmp_path / "pooled.npz", mu=held["mu"], sigma=held["sigma"])
    assert read_spatial_statistics(tmp_path / "pooled.npz") is None
    assert read_spatial_statistics(tmp_path / "none.npz") is None


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")
def test_inception_gives_what_adm_takes(tmp_path: Path) -> None:
    file = tmp_path / "inception.pth"
    torch.save(fresh_inception(file).state_dict(), file)
    pooled, spatial = both_features(load_extractor("inception", file), pictures(2))
    assert pooled.shape == (2, 2048)
    assert spatial is not None
    assert spatial.shape == (2, 7 * 17 * 17)
