"""Paired metrics against their closed forms."""

import math

import pytest
import torch

from diffattn.evaluation import psnr, ssim


def flat(value: float, size: int = 16) -> torch.Tensor:
    return torch.full((1, 3, size, size), value)


def noise(count: int = 2, seed: int = 0, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("difference", [0.5, 0.1, 0.01])
def test_psnr_of_a_constant_difference(difference: float) -> None:
    found = psnr(flat(0.25), flat(0.25 + difference))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(-20 * math.log10(difference), abs=1e-3)


def test_psnr_follows_its_definition() -> None:
    a, b = noise(seed=1), noise(seed=2)
    expected = -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()
    assert torch.allclose(psnr(a, b), expected, atol=1e-4)


@pytest.mark.parametrize(("x", "y"), [(0.2, 0.8), (0.5, 0.5), (0.0, 1.0)])
def test_ssim_of_flat_pictures(x: float, y: float) -> None:
    c = 0.01**2  # without variance only the luminance term is left
    assert ssim(flat(x), flat(y)).item() == pytest.approx((2 * x * y + c) / (x * x + y * y + c), abs=1e-4)


def test_identical_pictures() -> None:
    a = noise()
    assert torch.isinf(psnr(a, a)).all()
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_every_pair_for_itself_and_symmetric(metric) -> None:
    a, b = noise(3, seed=1), noise(3, seed=2)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert torch.allclose(metric(a, b), alone, atol=1e-5)
    assert torch.allclose(metric(a, b), metric(b, a), atol=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_the_pictures_does_not_matter(metric, dtype: torch.dtype) -> None:
    a, b = noise(seed=1).to(dtype), noise(seed=2).to(dtype)
    assert torch.allclose(metric(a, b).double(), metric(a.double(), b.double()), atol=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (flat(0.5), flat(0.5, 17), "same shape"),
        (flat(0.5)[0], flat(0.5)[0], r"\[B, 3, H, W\]"),
        (flat(0.5)[:, :1], flat(0.5)[:, :1], r"\[B, 3, H, W\]"),
        (flat(0.5)[:0], flat(0.5)[:0], r"\[B, 3, H, W\]"),
        (flat(1).long(), flat(1).long(), "int64"),
        (flat(0.5), flat(math.nan), "NaN"),
        (flat(math.inf), flat(0.5), "infinite"),
        (flat(-0.1), flat(0.5), r"0\.\.1, got -0\.1"),
        (flat(0.5), flat(255.0), "255"),
    ],
)
def test_bad_pictures(metric, a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_ssim_needs_its_window() -> None:
    with pytest.raises(ValueError, match="11x11"):
        ssim(flat(0.5, 10), flat(0.5, 10))
