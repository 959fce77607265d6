"""Counted operations: against formulas written out, and the multiply-adds of the papers."""

import pytest
import torch
from support.tiny_dit import inputs, run, tiny_dit
from torch.nn.functional import scaled_dot_product_attention

from diffattn.measure.flops import count_gflops, forward_gflops
from diffattn.models import DiT
from diffattn.models.config import PRESETS


def formula(model: DiT, tokens: int, n: int | None) -> float:
    """GFLOPs of a forward pass, without what the position biases cost (n None: softmax)."""
    c = model.config["hidden_size"]
    values = model.config["patch_size"] ** 2 * model.config["in_channels"]
    core = 2 * tokens**2 * c if n is None else 4 * tokens * n * c + tokens * c * 9
    block = tokens * (4 * c * c + 8 * c * c) + 6 * c * c + core
    outside = 256 * c + c * c + 2 * c * c + tokens * values * c * (2 if not model.config["learn_sigma"] else 3)
    return 2 * (model.config["num_layers"] * block + outside) / 1e9


@pytest.mark.parametrize("size", [16, 24])
def test_a_softmax_model_costs_what_the_formula_says(size: int) -> None:
    model = tiny_dit(attention="softmax")
    assert forward_gflops(model, sample_size=size) == pytest.approx(formula(model, (size // 2) ** 2, None), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 9, 16, 64])
def test_mediators_and_the_resizing_of_their_windows_cost_what_the_formulas_say(n: int) -> None:
    model = tiny_dit()
    windows = 2 * 2 * 3 * n * 2 * (8 * 7 * 7 + 8 * 7 * 8) / 1e9  # two layers, three heads, two windows; not per sample
    assert forward_gflops(model, n) == pytest.approx(formula(model, 64, n) + windows, rel=0.01)
    assert forward_gflops(model) == forward_gflops(model, 64)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "published"), [(None, 6.06), (4, 5.49), (16, 5.55), (64, 5.78)])
def test_the_published_multiply_adds_of_s_2(n: int | None, published: float) -> None:
    with torch.device("meta"):
        model = DiT(**PRESETS["S/2"], learn_sigma=True, attention="softmax" if n is None else "mediator")
    assert forward_gflops(model, n) / 2 == pytest.approx(published, rel=0.01)


@pytest.mark.slow
def test_counting_leaves_the_model_as_it_is() -> None:
    model = tiny_dit()
    model.set_num_mediators(16)
    before = run(model, *inputs())
    forward_gflops(model, 4, sample_size=(32, 16))
    assert model.num_mediators == 16
    assert torch.equal(run(model, *inputs()), before)


def test_attention_counts_on_the_cpu_too_and_the_backward_pass_twice() -> None:
    q = torch.randn(2, 3, 32, 8, requires_grad=True)
    k, v = (torch.randn(2, 3, 48, 8, requires_grad=True) for _ in range(2))
    forward = 2 * 2 * 2 * 3 * 32 * 48 * 8 / 1e9
    with torch.no_grad():
        assert count_gflops(lambda: scaled_dot_product_attention(q, k, v)) == pytest.approx(forward)
    both = count_gflops(lambda: scaled_dot_product_attention(q, k, v).sum().backward())
    assert both == pytest.approx(3 * forward)


def test_what_the_model_cannot_run_with_is_refused() -> None:
    with pytest.raises(ValueError, match="perfect square, got 5"):
        forward_gflops(tiny_dit(), 5)
    with pytest.raises(ValueError, match="multiples of the patch size 2, got 15x15"):
        forward_gflops(tiny_dit(), sample_size=15)


def test_a_depthwise_convolution_counts_as_one_in_both_directions() -> None:
    convolve = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, device="meta")
    x = torch.empty(2, 8, 5, 6, device="meta", requires_grad=True)
    forward = 2 * 2 * 8 * 5 * 6 * 9 / 1e9
    assert count_gflops(lambda: convolve(x)) == pytest.approx(forward)
    assert count_gflops(lambda: convolve(x).sum().backward()) == pytest.approx(3 * forward)


def test_fourier_transforms_are_counted_by_the_usual_formula() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = 6 * 2.5 * 64 * 6 / 1e9  # six transforms of 64 values
    assert count_gflops(lambda: torch.fft.rfft2(x)) == pytest.approx(expected)
    spectrum = torch.fft.rfft2(x)
    assert count_gflops(lambda: torch.fft.irfft2(spectrum, s=(8, 8))) == pytest.approx(expected)
