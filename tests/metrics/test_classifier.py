"""`diffattn.metrics.classifier`: shapes, resizing, files, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffattn.metrics.classifier import Classifier

TINY: Any = {"num_classes": 3, "input_size": 16, "widths": (4, 6, 8), "stem_filters": 5}


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(**TINY, domain="shapes", class_names=("a", "b", "c")).eval()


def test_logits_are_read_from_pooled_features(model: Classifier) -> None:
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    features = model.features(x)
    assert features.shape == (2, model.num_features) == (2, 8)
    assert features.min() >= 0
    torch.testing.assert_close(model(x), model.head(features))
    assert model(x).shape == (2, 3)


def test_pictures_of_another_size_are_resized(model: Classifier) -> None:
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    resized = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.features(large), model.features(resized))
    assert model(torch.zeros(1, 3, 20, 9)).isfinite().all()


def test_the_stem_is_not_trained(model: Classifier) -> None:
    model.train()(torch.rand(2, 3, 16, 16)).sum().backward()
    assert model.stem.weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "stem.weight")


def test_half_precision_files_load_as_float32(model: Classifier, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    before = model(x)
    model.half().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored["head.weight"].dtype == torch.float16
    loaded = Classifier.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config["domain"] == "shapes"
    assert list(loaded.config["class_names"]) == ["a", "b", "c"]
    torch.testing.assert_close(loaded.eval()(x), before, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": (4, 6)}, "widths must be three numbers"),
        ({"input_size": 20}, "multiple of 8, got 20"),
        ({"stem_filters": 49}, "1 to 48.* got 49"),
        ({"class_names": ("a",)}, "3 names or none, got 1"),
    ],
)
def test_a_wrong_size_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**(TINY | wrong))
