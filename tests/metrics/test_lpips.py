"""LPIPS with a backbone from a file: against torchmetrics' own parts, its properties, bad files."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import NetLinLayer, ScalingLayer, _normalize_tensor, _spatial_average

from diffattn.metrics.lpips import HEADS, Lpips, alexnet


def weights_of(net: torch.nn.Module) -> dict[str, Tensor]:
    """As torchvision names them, its classifier too."""
    return {f"features.{name}": x for name, x in net.state_dict().items()} | {"classifier.1.bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(weights_of(alexnet()), found)
    return found


@pytest.fixture(scope="module")
def lpips(file: Path) -> Lpips:
    return Lpips(file)


def pictures(count: int, size: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def of_torchmetrics(backbone: torch.nn.Sequential, a: Tensor, b: Tensor) -> Tensor:
    """Put together from torchmetrics' scaling, normalisation and heads."""
    heads = torch.load(HEADS, map_location="cpu", weights_only=True)
    found, (x, y) = torch.zeros(len(a)), (ScalingLayer()(2 * p - 1) for p in (a, b))
    number = 0
    for layer in backbone:
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            head = NetLinLayer(x.shape[1], use_dropout=True).eval()
            head.load_state_dict({"model.1.weight": heads[f"lin{number}.model.1.weight"]})
            found = found + _spatial_average(head((_normalize_tensor(x) - _normalize_tensor(y)) ** 2)).flatten()
            number += 1
    assert number == 5
    return found.detach()


def test_equals_the_parts_of_torchmetrics(lpips: Lpips) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    torch.testing.assert_close(lpips(a, b), of_torchmetrics(lpips.backbone, a, b), rtol=1e-4, atol=1e-6)


def test_zero_if_identical_symmetric_and_growing(lpips: Lpips) -> None:
    a, b = pictures(2), pictures(2, seed=1)
    assert lpips(a, a).tolist() == [0, 0]
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    near, far = lpips(a, 0.95 * a + 0.05 * b), lpips(a, 0.5 * a + 0.5 * b)
    assert (near > 0).all()
    assert (near < far).all()
    torch.testing.assert_close(lpips(a, b)[1:], lpips(a[1:], b[1:]))


def test_safetensors_and_pth_are_the_same(file: Path, lpips: Lpips, tmp_path: Path) -> None:
    save_file(torch.load(file, weights_only=True), tmp_path / "alexnet.safetensors")
    assert Lpips(tmp_path / "alexnet.safetensors").hash == lpips.hash


def test_bad_files_say_where_to_get_the_weights(tmp_path: Path) -> None:
    torch.save({"code": print}, tmp_path / "code.pth")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, why in {"no.pth": "No such file", "code.pth": "more than tensors", "other.pth": "Error", "list.pth":
                      "does not contain named tensors"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"AlexNet: .*{why}.*get https://download.pytorch.org"):
            Lpips(tmp_path / name)


def test_pictures_must_fit(lpips: Lpips) -> None:
    with pytest.raises(ValueError, match="31 pixels a side"):
        lpips(pictures(1, 30), pictures(1, 30))
    with pytest.raises(ValueError, match=r"\[1, 3, 40, 40\] and \[2, 3, 40, 40\]"):
        lpips(pictures(1), pictures(2))
    assert lpips(pictures(1, 31), pictures(1, 31, seed=1)).item() > 0


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_the_layers_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models import alexnet as whole  # type: ignore[import-not-found]

    torch.manual_seed(0)
    net = whole(weights=None)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    x = pictures(1, 64)
    with torch.no_grad():
        expected = net.features[:-1](x)  # the last is a pooling
        torch.testing.assert_close(Lpips(tmp_path / "a.pth").backbone(x), expected)
