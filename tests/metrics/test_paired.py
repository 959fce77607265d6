"""Paired metrics against their closed forms."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from diffattn import patch
from diffattn.metrics.paired import (
    LatentTrace,
    foreground,
    foreground_psnr,
    latent_relative_error,
    mean_of_known,
    psnr,
    ssim,
)


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


@pytest.mark.parametrize("metric", [psnr, ssim, foreground_psnr])
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


def on_white(size: int = 16) -> torch.Tensor:
    """One blue-ish pixel at row 5, column 9: only the red channel is below white."""
    picture = flat(1.0, size)
    picture[0, 0, 5, 9] = 0.2
    return picture


@pytest.mark.parametrize(("margin", "rows", "columns"), [(0, (5, 6), (9, 10)), (2, (3, 8), (7, 12))])
def test_foreground_is_what_is_not_white_and_a_margin(margin: int, rows: tuple, columns: tuple) -> None:
    expected = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    expected[:, :, slice(*rows), slice(*columns)] = True
    assert torch.equal(foreground(on_white(), margin=margin), expected)


def test_nearly_white_is_background() -> None:
    assert not foreground(flat(0.98)).any()
    assert foreground(flat(0.96)).all()
    assert foreground(flat(0.98), tolerance=0.01).all()


def test_foreground_psnr_follows_its_definition() -> None:
    reference, other = on_white(), on_white()
    other[0, 1, 5, 9] = 0.5  # 0.5 off in one of 3·25 values
    other[0, :, 15, 15] = 0.0  # outside the foreground
    expected = -10 * math.log10(0.5**2 / 75)
    assert foreground_psnr(other, reference).item() == pytest.approx(expected, abs=1e-4)
    assert foreground_psnr(other, reference, margin=0).item() == pytest.approx(-10 * math.log10(0.5**2 / 3), abs=1e-4)


def test_white_around_it_hides_error_from_psnr_only() -> None:
    small, large = on_white(16), on_white(64)
    values = []
    for picture in (small, large):
        other = picture.clone()
        other[0, 0, 5, 9] = 0.7
        values.append((psnr(other, picture).item(), foreground_psnr(other, picture).item()))
    assert values[1][0] > values[0][0] + 11
    assert values[1][1] == pytest.approx(values[0][1], abs=1e-4)


def test_without_white_foreground_psnr_is_psnr() -> None:
    a, b = noise(seed=1) * 0.9, noise(seed=2) * 0.9
    assert torch.allclose(foreground_psnr(a, b), psnr(a, b), atol=1e-4)


def test_pictures_without_foreground_are_nan_and_left_out_of_the_mean() -> None:
    reference = torch.cat([flat(1.0), on_white(), on_white()])
    other = reference.clone()
    other[1, 0, 5, 9] = 0.7
    found = foreground_psnr(other, reference)
    assert found[0].isnan()
    assert found[2].isinf()
    assert mean_of_known(found[:2]) == pytest.approx(found[1].item())
    assert mean_of_known(found) == math.inf
    assert mean_of_known(found[:1]) is None


@pytest.mark.parametrize(("options", "message"), [({"tolerance": 1.0}, "tolerance"), ({"margin": -1}, "margin")])
def test_bad_definitions_of_foreground(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreground(flat(0.5), **options)


def test_latent_relative_error_of_a_scaled_copy() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1.0, 1.5, 0.0])
    assert torch.allclose(latent_relative_error(x * scales[:, None, None, None], x), (scales - 1).abs(), atol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        latent_relative_error(x, x[:2])


@pytest.mark.slow
def test_latents_are_recorded_through_a_pipeline(tmp_path: Path) -> None:
    pipe: Any = tiny.pipeline("sd", tmp_path)
    exact, patched = LatentTrace(), LatentTrace()
    arguments = dict(prompt=["a", "b"], output_type="latent")
    final = pipe(**arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
                 callback_on_step_end=exact).images  # fmt: skip
    with patch(pipe, min_tokens=0, num_agents=4, agent_ratio=None, max_head_error=10.0):
        for _ in range(2):  # a new run starts a new trace
            pipe(**arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
                 callback_on_step_end=patched)  # fmt: skip
    errors = patched.errors(exact)
    assert [len(picture) for picture in errors] == [3, 3]
    assert all(0 < picture[0] < picture[-1] < 1 for picture in errors)
    assert torch.equal(exact.steps[-1], final)
    assert exact.errors(exact) == [[0.0] * 3] * 2
    patched.steps.pop()
    with pytest.raises(ValueError, match="2 and 3"):
        patched.errors(exact)
