"""Focused linear attention as a function of tensors: the published numbers, its formula, where it must stay finite."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.linear_family import FamilyCase, family_cases
from support.tensors import as_image, as_tokens, join, random, split
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, layer_norm, linear, softplus

from diffattn.functional import focused_linear_attention
from diffattn.functional.focused_linear import focus


def formula(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, heads: int, power: float) -> Tensor:
    """Explicit weights [B, H, N, M], and the feature map without its safeguard."""

    def feature(x: Tensor) -> Tensor:
        u = (x.relu() + 1e-6) / scale
        return u.norm(dim=-1, keepdim=True) * u**power / (u**power).norm(dim=-1, keepdim=True)

    weights = split(feature(q), heads) @ split(feature(k), heads).mT / k.shape[1]
    return join(weights / (weights.sum(dim=-1, keepdim=True) + 1e-6) @ split(v, heads))


def _reduced(case: FamilyCase, x: Tensor) -> Tensor:
    """The tokens of which keys and values are made: fewer where the layer has a strided convolution."""
    if (ratio := case.params.get("sr_ratio", 1)) == 1:
        return x
    w = case.weights()
    image = conv2d(as_image(x, case.grid), w["sr.weight"], w["sr.bias"], stride=ratio)
    return layer_norm(as_tokens(image), x.shape[-1:], w["norm.weight"], w["norm.bias"])


@family_cases("flatten_")
def test_the_layer_matches_the_published_implementation(case: FamilyCase) -> None:
    w, heads = case.weights(), case.params["heads"]
    x = case.input()
    if "qkv.weight" in w:
        q, k, v = linear(x, w["qkv.weight"], w["qkv.bias"]).chunk(3, dim=-1)
    else:
        q = linear(x, w["q.weight"], w["q.bias"])
        k, v = linear(_reduced(case, x), w["kv.weight"], w["kv.bias"]).chunk(2, dim=-1)
    scale = softplus(w["scale"]).flatten()
    power = case.params["focusing_factor"]
    core = focused_linear_attention(q, k + w["positional_encoding"], v, scale=scale, num_heads=heads, power=power)
    if v.shape[1] < x.shape[1]:
        v = interpolate(v.mT, size=x.shape[1], mode="linear").mT
    images = as_image(v, case.grid).unflatten(1, (heads, -1)).flatten(0, 1)  # [B·H, D, h, w]
    local = conv2d(images, w["dwc.weight"], w["dwc.bias"], padding=2, groups=images.shape[1])
    before = core + as_tokens(local.unflatten(0, (len(x), heads)).flatten(1, 2))
    case.assert_close(before, "mid.pre_proj")
    case.assert_matches(x, linear(before, w["proj.weight"], w["proj.bias"]))


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 4),
    dim=st.integers(1, 6),
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    power=st.sampled_from([1, 2, 3, 4.5]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_formula_with_explicit_weights(
    batch: int, heads: int, dim: int, queries: int, keys: int, power: float, seed: int
) -> None:
    channels = heads * dim
    q = random(batch, queries, channels, seed=seed, dtype=torch.float64)
    k, v = (random(batch, keys, channels, seed=seed + s, dtype=torch.float64) for s in (11, 12))
    scale = softplus(random(channels, seed=seed + 13, dtype=torch.float64))
    out = focused_linear_attention(q, k, v, scale=scale, num_heads=heads, power=power)
    torch.testing.assert_close(out, formula(q, k, v, scale, heads, power), rtol=1e-8, atol=1e-8)


@given(power=st.floats(1, 40), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_the_feature_map_keeps_norms_and_turns_towards_the_largest_channel(power: float, seed: int) -> None:
    x = random(1, 6, 9, seed=seed, dtype=torch.float64)
    scale = torch.full((9,), 0.7, dtype=torch.float64)
    plain, focused = focus(x, scale, 1), focus(x, scale, power)
    torch.testing.assert_close(focused.norm(dim=-1), plain.norm(dim=-1))
    assert (focused.amax(-1) >= plain.amax(-1) - 1e-9).all()


@pytest.mark.parametrize("power", [1, 3, 4, 8, 32, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["negative", "zero", "one negative token", "large", "offset"])
def test_finite_with_gradients_in_every_precision(power: float, dtype: torch.dtype, kind: str) -> None:
    x = random(1, 24, 16, seed=3)
    q = {
        "negative": -x.abs() - 1,
        "zero": torch.zeros_like(x),
        "one negative token": torch.where(torch.arange(24)[:, None] == 5, -1.0, x),
        "large": 2e4 * x.clamp(-3, 3),
        "offset": x + 1e4,
    }[kind]
    inputs = [t.to(dtype).requires_grad_() for t in (q, q.roll(1, 1), x)]
    scale = softplus(random(16, seed=4)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = focused_linear_attention(*inputs, scale=scale, num_heads=2, power=power)
    assert out.dtype == dtype
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.float().sum(), inputs):
        assert grad.isfinite().all()


def test_half_precision_is_as_near_as_its_inputs() -> None:
    q, k, v = (random(1, 64, 32, seed=s).bfloat16() for s in range(3))
    scale = torch.full((32,), 0.7)
    exact = formula(q.double(), k.double(), v.double(), scale.double(), 4, 3)
    out = focused_linear_attention(q, k, v, scale=scale, num_heads=4)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, focused_linear_attention(q, k, v, scale=scale, num_heads=4))


def test_output_of_tokens_that_share_channels_lies_between_the_values() -> None:
    q, k, v = random(2, 30, 8).abs(), random(2, 12, 8, seed=1).abs() + 0.1, random(2, 12, 8, seed=2)
    out = focused_linear_attention(q, k, v, scale=torch.ones(8), num_heads=2)
    assert (out <= v.amax(1, keepdim=True) + 1e-4).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-4).all()
    alone = focused_linear_attention(q[:, :1], k[:, :1], v[:, :1], scale=torch.ones(8), num_heads=2)
    torch.testing.assert_close(alone, v[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("power", [1, 3, 2.5])
def test_gradients_are_those_of_finite_differences(power: float) -> None:
    q = random(1, 4, 6, dtype=torch.float64).requires_grad_()
    k, v = (random(1, 5, 6, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    scale = softplus(random(6, seed=3, dtype=torch.float64)).requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return focused_linear_attention(q, k, v, scale=scale, num_heads=2, power=power)

    assert torch.autograd.gradcheck(attention, (q, k, v, scale))


@pytest.mark.parametrize("power", [0, 0.5, -3, float("nan"), float("inf"), True, "3"])
def test_refuses_a_power_out_of_range(power: Any) -> None:
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="power must be a finite number of at least 1, got") as caught:
        focused_linear_attention(x, x, x, scale=torch.ones(8), num_heads=2, power=power)
    assert repr(power) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        ({"num_heads": 0}, "num_heads must divide the 8 channels, got 0"),
        ({"scale": torch.ones(4)}, r"scale must have the shape \[8\].*got \[4\]"),
        ({"scale": torch.ones(1, 1, 8)}, r"scale must have the shape \[8\].*got \[1, 1, 8\]"),
        ({"k": torch.zeros(1, 4, 4)}, r"k and v \[B, M, C\].*k \[1, 4, 4\]"),
        ({"v": torch.zeros(1, 5, 8)}, r"k and v \[B, M, C\].*v \[1, 5, 8\]"),
    ],
)
def test_refuses_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 4, 8)
    arguments = {"q": x, "k": x, "v": x, "scale": torch.ones(8), "num_heads": 2} | options
    with pytest.raises(ValueError, match=message):
        focused_linear_attention(**arguments)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    q, k, v = (random(1, 12, 8, seed=s) for s in range(3))
    compiled = torch.compile(focused_linear_attention, fullgraph=True, backend="eager")
    found = compiled(q, k, v, scale=torch.ones(8), num_heads=2)
    torch.testing.assert_close(found, focused_linear_attention(q, k, v, scale=torch.ones(8), num_heads=2))
