"""`diffattn.metrics.extractors` and `features`, with tiny networks of the real classes."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_metrics import fresh_inception, random_pictures
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import EXTRACTORS, FeatureExtractor, load_extractor, weights_hash
from diffattn.metrics.features import as_uint8, features_of
from diffattn.metrics.fid import fid

LAYERS: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Extractor -> a folder with tiny weights."""
    torch.manual_seed(0)
    clip = CLIPVisionConfig(**LAYERS, intermediate_size=32, projection_dim=12, image_size=16)
    models = {
        "cifar-classifier": Classifier(3, 16, (4, 6, 8), 5, "CIFAR-10"),
        "emoji-classifier": Classifier(3, 24, (4, 6, 10), 5, "emoji"),
        "dinov2": Dinov2Model(Dinov2Config(**LAYERS, mlp_ratio=2, image_size=16)),
        "clip": CLIPVisionModelWithProjection(clip),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def extractor(folders: dict[str, Path]) -> FeatureExtractor:
    return load_extractor("cifar-classifier", folders["cifar-classifier"])


pictures = partial(random_pictures, size=20)


@pytest.mark.parametrize(
    ("name", "features", "side", "domain"),
    [
        ("cifar-classifier", 8, 16, "CIFAR-10"),
        ("emoji-classifier", 10, 24, "emoji"),
        ("dinov2", 16, 16, None),
        ("clip", 12, 16, None),
    ],
)
def test_every_extractor_says_what_it_is(
    folders: dict[str, Path], name: str, features: int, side: int, domain: str | None
) -> None:
    extractor = load_extractor(name, folders[name])
    assert (extractor.name, extractor.num_features, extractor.input_size) == (name, features, side)
    assert extractor.domain == domain
    assert f"{side}x{side}" in extractor.resize
    assert len(extractor.hash) == 64
    x = pictures(3)
    found = extractor(x)
    assert found.shape == (3, features)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(extractor.train()(x), found)  # stays in evaluation mode
    assert not any(p.requires_grad for p in extractor.parameters())


def test_dinov2_gives_the_class_token_of_normalised_pictures(folders: dict[str, Path]) -> None:
    x = pictures(2, size=16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (x / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folders["dinov2"]).eval()(normal).last_hidden_state[:, 0]
    torch.testing.assert_close(load_extractor("dinov2", folders["dinov2"])(x), expected, atol=1e-5, rtol=1e-5)


def test_the_hash_follows_the_weights(folders: dict[str, Path]) -> None:
    one, other = (load_extractor("cifar-classifier", folders["cifar-classifier"]) for _ in range(2))
    changed: Any = other.model
    assert one.hash == other.hash == weights_hash(other.model)
    changed.head.bias.data[0] += 1e-3
    assert weights_hash(other.model) != one.hash


def test_torchmetrics_takes_an_extractor(extractor: FeatureExtractor) -> None:
    real, fake = pictures(30, size=16), pictures(40, size=16, seed=1) // 2
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = fid(features_of([fake], extractor), features_of([real], extractor))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)


def test_features_do_not_depend_on_how_pictures_are_cut(extractor: FeatureExtractor) -> None:
    x = pictures(10)
    seen: list[int] = []
    whole = features_of([x], extractor, batch_size=4, on_batch=seen.append)
    assert seen == [4, 4, 2]
    assert whole.shape == (10, 8)
    assert whole.dtype == torch.float32
    single = features_of(x.split(1), extractor, batch_size=3)
    torch.testing.assert_close(single, whole)
    torch.testing.assert_close(features_of([x[:3], x[:0], x[3:]], extractor, 100), whole)
    mixed = features_of([x[:3], pictures(2, size=31), x[3:]], extractor)
    torch.testing.assert_close(torch.cat((mixed[:3], mixed[5:])), whole)


def test_pictures_in_floating_point_are_rounded() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    torch.testing.assert_close(as_uint8(levels / 255), levels)
    torch.testing.assert_close(as_uint8((levels.double() / 255 - 0.4 / 255).clamp(0)), levels)
    assert as_uint8(levels) is levels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 4, 4), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 4, 4), 1.5), "in 0..1, got 1.5"),
        (torch.full((1, 3, 4, 4), -1.0), "in 0..1, got -1"),
        (torch.zeros(3, 4, 4), r"\[b, 3, h, w\], got \[3, 4, 4\]"),
        (torch.zeros(1, 1, 4, 4), r"\[b, 3, h, w\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "uint8 or floating point"),
    ],
)
def test_pictures_that_are_none(extractor: FeatureExtractor, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features_of([images], extractor)


def test_no_pictures_and_broken_weights(folders: dict[str, Path]) -> None:
    extractor: Any = load_extractor("cifar-classifier", folders["cifar-classifier"])
    with pytest.raises(ValueError, match="no pictures"):
        features_of([], extractor)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        features_of([pictures(1)], extractor, batch_size=0)
    with pytest.raises(ValueError, match="must be uint8"):
        extractor(torch.rand(1, 3, 8, 8))
    extractor.model.stages[0][0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="'cifar-classifier' gave features that are NaN"):
        features_of([pictures(1)], extractor)


def test_an_extractor_without_weights_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown extractor 'vgg'; choose from cifar-classifier.*inception"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match=r"no weights in .*train_classifiers.py emoji"):
        load_extractor("emoji-classifier", tmp_path)
    with pytest.raises(ValueError, match=r"'dinov2' could not be loaded from .*safetensors weights of a Dinov2Model"):
        load_extractor("dinov2", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'cifar-classifier' could not be loaded"):
        load_extractor("cifar-classifier", tmp_path)


def test_a_cut_off_file_is_refused_by_name(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="'dinov2' could not be loaded from"):
        load_extractor("dinov2", tmp_path)


HAS_FIDELITY = importlib.util.find_spec("torch_fidelity") is not None


@pytest.mark.skipif(HAS_FIDELITY, reason="torch-fidelity is installed")
def test_inception_without_torch_fidelity() -> None:
    with pytest.raises(ValueError, match=r"pip install 'diffattn\[inception\]'.*cifar-classifier"):
        load_extractor("inception")


@pytest.mark.skipif(not HAS_FIDELITY, reason="needs torch-fidelity")
def test_inception_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inception.pth"
    fresh = fresh_inception(file)
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception"):
        load_extractor("inception", file)
    torch.save(fresh.state_dict(), file)
    save_file(fresh.state_dict(), tmp_path / "inception.safetensors")
    x = pictures(2)
    found = load_extractor("inception", file)
    assert found.hash == load_extractor("inception", tmp_path / "inception.safetensors").hash
    torch.testing.assert_close(found(x), fresh(x)[0])
    assert found(x).shape == (2, 2048)
    torch.save({"code": print}, file)
    with pytest.raises(ValueError, match=r"inception.pth': it contains more than tensors; get https://github.com"):
        load_extractor("inception", file)


def test_the_registry_lists_all() -> None:
    assert list(EXTRACTORS) == ["cifar-classifier", "emoji-classifier", "inception", "dinov2", "clip"]
