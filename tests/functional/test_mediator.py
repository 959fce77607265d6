"""Mediator attention and its position biases as tensor functions: published numbers, formula, resizing, refusals."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import Case
from support.tensors import random
from support.tiny_dit import dit_cases
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, linear

from diffattn.functional import (
    gather_bias,
    mediator_attention,
    mediator_side,
    pool_mediators,
    resize_axis,
    resize_mediators,
    spread_bias,
)

sides = st.integers(1, 12)


def biases(heads: int, n: int, h: int, w: int, seed: int = 0) -> dict[str, Tensor]:
    """Random biases with the shapes of a published checkpoint."""
    shapes = {
        "an": (heads, n, 7, 7),
        "na": (heads, n, 7, 7),
        "ah": (1, heads, n, h, 1),
        "aw": (1, heads, n, 1, w),
        "ha": (1, heads, h, 1, n),
        "wa": (1, heads, 1, w, n),
    }
    return {name: random(*shape, seed=seed + i, dtype=torch.float64) for i, (name, shape) in enumerate(shapes.items())}


# The published numbers.


@dit_cases("mediator_attn_")
def test_a_layer_matches_the_published_implementation(case: Case) -> None:
    p, w, x = case.params, case.tensors, case["in.x"]
    grid = (p["grid"][0], p["grid"][1])
    qkv = linear(x, w["w.qkv.weight"], w["w.qkv.bias"]).unflatten(-1, (3, p["num_heads"], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gather = gather_bias(w["w.an_bias"], w["w.ah_bias"], w["w.aw_bias"], grid)
    spread = spread_bias(w["w.na_bias"], w["w.ha_bias"], w["w.wa_bias"], grid)
    out = mediator_attention(q, k, v, pool_mediators(q, grid, p["mediator_num"]), gather, spread)
    image = v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)
    convolved = conv2d(image, w["w.dwc.weight"], w["w.dwc.bias"], padding=1, groups=p["dim"])
    y = out.transpose(1, 2).flatten(2) + convolved.flatten(2).transpose(1, 2)
    case.assert_close(linear(y, w["w.proj.weight"], w["w.proj.bias"]), "out.y")


@dit_cases("mediator_interp_")
def test_biases_of_another_resolution_are_resized_as_published(case: Case) -> None:
    axes = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
    for name, axis in axes.items():
        key = f"blocks.0.attn.{name}"
        case.assert_close(resize_axis(case[f"in.{key}"], axis, case.params["grid_out"]), f"out.{key}")


# The formula.


@given(
    heads=st.integers(1, 3),
    h=st.integers(2, 8),
    w=st.integers(2, 8),
    side=st.integers(1, 4),
    dim=st.sampled_from([1, 4, 8]),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_equals_the_formula_with_explicit_matrices(
    heads: int, h: int, w: int, side: int, dim: int, with_bias: bool
) -> None:
    n, grid = min(side, h, w) ** 2, (h, w)
    q, k, v = (random(2, heads, h * w, dim, seed=s, dtype=torch.float64) for s in range(3))
    b = biases(heads, n, h, w)
    gather, spread = gather_bias(b["an"], b["ah"], b["aw"], grid), spread_bias(b["na"], b["ha"], b["wa"], grid)
    mediators = pool_mediators(q, grid, n)
    chosen = (gather, spread) if with_bias else ()
    out = mediator_attention(q, k, v, mediators, *chosen)
    scale, share = dim**-0.5, float(with_bias)
    gathered = (scale * mediators @ k.mT + share * gather).softmax(-1) @ v
    expected = (scale * q @ mediators.mT + share * spread).softmax(-1) @ gathered
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_output_lies_between_the_values() -> None:
    q, k, v = (random(2, 2, 16, 8, seed=s) for s in range(3))
    out = mediator_attention(q, k, v, pool_mediators(q, (4, 4), 4))
    assert (out <= v.amax(2, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-5).all()


def test_a_bias_decides_alone_when_it_is_large() -> None:
    q, k, v = (random(1, 1, 16, 4, seed=s) for s in range(3))
    gather = torch.zeros(1, 4, 16)
    gather[0, torch.arange(4), [3, 7, 11, 15]] = 1e4  # mediator i sees token 4·i + 3 only
    spread = torch.zeros(1, 16, 4)
    spread[0, :, 2] = 1e4  # every token listens to mediator 2
    out = mediator_attention(q, k, v, pool_mediators(q, (4, 4), 4), gather, spread)
    torch.testing.assert_close(out, v[:, :, 11:12].expand_as(v))


def test_gradients_are_those_of_finite_differences_also_of_the_biases() -> None:
    q, k, v = (random(1, 2, 9, 4, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))
    b = [x.requires_grad_() for x in biases(2, 4, 2, 4).values()]

    def attention(q: Tensor, k: Tensor, v: Tensor, *b: Tensor) -> Tensor:
        gather, spread = gather_bias(b[0], b[2], b[3], (3, 3)), spread_bias(b[1], b[4], b[5], (3, 3))
        return mediator_attention(q, k, v, pool_mediators(q, (3, 3), 4), gather, spread)

    assert torch.autograd.gradcheck(attention, (q, k, v, *b), fast_mode=True)


@pytest.mark.parametrize(("dtype", "learns"), list(product([torch.float16, torch.bfloat16], [False, True])))
def test_large_logits_stay_finite_and_right_in_half_precision(dtype: torch.dtype, learns: bool) -> None:
    q, k, v = (random(2, 2, 64, 64, seed=s) * f for s, f in enumerate((60, 60, 1)))
    q, k, v = (x.to(dtype) for x in (q + 60, k + 60, v))  # logits before scaling reach hundreds of thousands
    mediators = pool_mediators(q, (8, 8), 16)
    assert (mediators.double() @ k.double().mT).amax() > torch.finfo(torch.float16).max
    gather, spread = random(2, 16, 64, seed=7).to(dtype), random(2, 64, 16, seed=8).to(dtype)
    wide = [x.double() for x in (q, k, v, mediators, gather, spread)]
    out = mediator_attention(q, k, v, mediators, gather.requires_grad_(learns), spread.requires_grad_(learns))
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), mediator_attention(*wide), atol=4 * step, rtol=4 * step)


# Pooling.


@given(h=sides, w=sides, side=sides)
@settings(deadline=None, max_examples=40)
def test_mediators_are_adaptive_averages_on_any_grid(h: int, w: int, side: int) -> None:
    side = min(side, h, w)
    q = random(2, 3, h * w, 4, dtype=torch.float64)
    image = q.transpose(2, 3).reshape(6, 4, h, w)
    expected = adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2).reshape(2, 3, side**2, 4)
    torch.testing.assert_close(pool_mediators(q, (h, w), side**2), expected)


def test_as_many_mediators_as_tokens_are_the_queries() -> None:
    q = random(1, 2, 25, 4)
    torch.testing.assert_close(pool_mediators(q, (5, 5), 25), q)


# Biases on any grid.


@given(h=sides, w=sides, own_h=sides, own_w=sides, side=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_biases_take_the_shape_of_any_grid_and_mirror_each_other(
    h: int, w: int, own_h: int, own_w: int, side: int
) -> None:
    b = biases(2, side**2, own_h, own_w)
    gather = gather_bias(b["an"], b["ah"], b["aw"], (h, w))
    assert gather.shape == (2, side**2, h * w)
    ha, wa = (x.permute(0, 1, 3, 4, 2) for x in (b["ah"], b["aw"]))  # [1, H, n, h, 1] -> [1, H, h, 1, n]
    torch.testing.assert_close(spread_bias(b["an"], ha, wa, (h, w)), gather.transpose(1, 2))


@given(h=sides, w=sides)
@settings(deadline=None, max_examples=20)
def test_biases_are_the_sum_of_their_parts(h: int, w: int) -> None:
    b = biases(2, 4, h, w)
    gather = gather_bias(b["an"], b["ah"], b["aw"], (h, w)).unflatten(2, (h, w))
    window = interpolate(b["an"], size=(h, w), mode="bilinear")
    for row, column in product(range(h), range(w)):
        expected = window[..., row, column] + b["ah"][0, ..., row, 0] + b["aw"][0, ..., 0, column]
        torch.testing.assert_close(gather[..., row, column], expected)


def test_a_grid_of_the_window_s_own_size_takes_it_as_it_is() -> None:
    an, zero = random(2, 4, 7, 7), torch.zeros(1, 2, 4, 1, 1)
    torch.testing.assert_close(gather_bias(an, zero, zero, (7, 7)), an.flatten(2))


@given(size=sides, new=sides, slope=st.floats(-3, 3))
@settings(deadline=None, max_examples=40)
def test_resizing_an_axis_keeps_its_ends_and_straight_lines(size: int, new: int, slope: float) -> None:
    line = (slope * torch.linspace(0, 1, size, dtype=torch.float64) + 1).reshape(1, size, 1).expand(2, size, 3)
    resized = resize_axis(line, 1, new)
    assert resized.shape == (2, new, 3)
    torch.testing.assert_close(resized[:, 0], line[:, 0])
    if new > 1:
        torch.testing.assert_close(resized[:, -1], line[:, -1])
    if size > 1:
        expected = slope * torch.linspace(0, 1, new, dtype=torch.float64) + 1
        torch.testing.assert_close(resized[0, :, 0], expected)


@given(side=st.integers(1, 8), new=st.integers(1, 8), constant=st.floats(-2, 2))
@settings(deadline=None, max_examples=30)
def test_resizing_mediators_keeps_constants_and_commutes_with_turning_the_grid(
    side: int, new: int, constant: float
) -> None:
    flat = torch.full((2, side**2, 3), constant, dtype=torch.float64)
    resized = resize_mediators(flat, 1, new**2)
    torch.testing.assert_close(resized, torch.full((2, new**2, 3), constant, dtype=torch.float64))
    bias = random(2, side, side, 3, dtype=torch.float64)
    straight = resize_mediators(bias.flatten(1, 2), 1, new**2).unflatten(1, (new, new))
    turned = resize_mediators(bias.transpose(1, 2).flatten(1, 2), 1, new**2).unflatten(1, (new, new))
    torch.testing.assert_close(turned.transpose(1, 2), straight)


def test_half_precision_biases_are_resized_in_fp32() -> None:
    b = {name: x.to(torch.bfloat16) for name, x in biases(1, 4, 3, 3).items()}
    gather = gather_bias(b["an"], b["ah"], b["aw"], (5, 5))
    assert gather.dtype == torch.float32
    wide = gather_bias(b["an"].float(), b["ah"].float(), b["aw"].float(), (5, 5))
    torch.testing.assert_close(gather, wide)


def test_biases_are_resized_in_fp32_under_autocast_too() -> None:
    b = {name: x.float() for name, x in biases(2, 4, 3, 3).items()}
    outside = gather_bias(b["an"], b["ah"], b["aw"], (5, 6)), spread_bias(b["na"], b["ha"], b["wa"], (5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        inside = gather_bias(b["an"], b["ah"], b["aw"], (5, 6)), spread_bias(b["na"], b["ha"], b["wa"], (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


# What is refused.


@pytest.mark.parametrize(("n", "message"), [
    (5, "got 5; the nearest are 4 and 9"),
    (0, "got 0"),
    (-4, "got -4"),
    (16.0, "got 16.0"),
    (True, "got True"),
])  # fmt: skip
def test_mediators_that_are_no_square_are_refused(n: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"num_mediators must be a perfect square.*{message}"):
        mediator_side(n)


def test_more_mediators_than_the_grid_holds_are_refused() -> None:
    q = random(1, 1, 32, 4)
    with pytest.raises(ValueError, match=r"num_mediators=25 is 5x5 and larger than the grid of 4x8.*up to 16"):
        pool_mediators(q, (4, 8), 25)
    assert pool_mediators(q, (4, 8), 16).shape == (1, 1, 16, 4)


@pytest.mark.parametrize("grid", [(4, 4), (3, 8)])
def test_a_grid_that_does_not_match_the_tokens_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"a grid of {grid[0]}x{grid[1]} has"):
        pool_mediators(random(1, 1, 20, 4), grid, 4)


@pytest.mark.parametrize("name", ["gather_bias", "spread_bias"])
def test_a_bias_of_another_shape_is_refused(name: str) -> None:
    q = random(1, 2, 16, 4)
    with pytest.raises(ValueError, match=rf"{name} must have the shape .*got \[2, 3, 3\]"):
        mediator_attention(q, q, q, pool_mediators(q, (4, 4), 4), **{name: torch.zeros(2, 3, 3)})
