"""InLine attention as a function of tensors: the published numbers, its formula, its relation to softmax, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.linear_family import FamilyCase, family_cases
from support.tensors import as_image, as_tokens, join, random, relative_error, split
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, gelu, linear, scaled_dot_product_attention

from diffattn.functional import inline_attention


def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights 1/M + (s·q·k - mean of s·q·k over the keys)/M, one by one."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (1 + logits - logits.mean(dim=-1, keepdim=True)) / k.shape[-2] @ v


@family_cases("inline_")
def test_the_layer_matches_the_published_implementation(case: FamilyCase) -> None:
    w, heads, apart = case.weights(), case.params["heads"], case.params["global_tokens"]
    x = case.input()
    if "qkv.weight" in w:
        q, k, v = linear(x, w["qkv.weight"], w["qkv.bias"]).chunk(3, dim=-1)
    else:
        q, (k, v) = linear(x, w["q.weight"], w["q.bias"]), linear(x, w["kv.weight"], w["kv.bias"]).chunk(2, dim=-1)
    if case.params["phi"] == "exp":
        q, k = (0.2 * q).exp(), (0.2 * k).exp()
    core = join(inline_attention(*(split(t, heads) for t in (q, k, v))))
    mean = x.mean(dim=1, keepdim=True).mT  # [B, C, 1]
    hidden = gelu(conv1d(mean, w["residual.0.weight"], w["residual.0.bias"], groups=heads))
    kernels = conv1d(hidden, w["residual.2.weight"], w["residual.2.bias"], groups=heads)
    case.assert_close(kernels, "mid.res_weight")
    image = as_image(v[:, apart:], case.grid).flatten(0, 1)[None]  # [1, B·C, h, w]
    local = conv2d(image, kernels.reshape(-1, 1, 3, 3), padding=1, groups=image.shape[1])
    local = as_tokens(local.unflatten(1, (len(x), -1))[0])
    before = torch.cat((core[:, :apart], core[:, apart:] + local), dim=1)
    case.assert_close(before, "mid.pre_proj")
    case.assert_matches(x, linear(before, w["proj.weight"], w["proj.bias"]))


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 30),
    keys=st.integers(1, 30),
    dim=st.integers(1, 17),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_formula_with_explicit_weights(
    batch: int, heads: int, queries: int, keys: int, dim: int, seed: int
) -> None:
    q = random(batch, heads, queries, dim, seed=seed, dtype=torch.float64)
    k, v = (random(batch, heads, keys, dim, seed=seed + s, dtype=torch.float64) for s in (11, 12))
    torch.testing.assert_close(inline_attention(q, k, v), published(q, k, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("spread", "bound"), [(0.1, 0.02), (0.25, 0.04), (0.5, 0.08), (1.0, 0.2)])
def test_close_to_softmax_where_the_logits_are_flat(spread: float, bound: float) -> None:
    q, k, v = (random(1, 2, 1024, 64, seed=s, dtype=torch.float64) for s in range(3))
    v = v + 1  # as in pictures, values have a mean
    exact = scaled_dot_product_attention(q * spread, k, v)
    assert relative_error(inline_attention(q * spread, k, v), exact) < bound


@given(offset=st.floats(-100, 100), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_an_offset_of_the_keys_changes_nothing_and_one_of_the_values_is_added(offset: float, seed: int) -> None:
    q, k, v = (random(1, 2, 20, 8, seed=seed + s, dtype=torch.float64) for s in range(3))
    out = inline_attention(q, k, v)
    torch.testing.assert_close(inline_attention(q, k + offset, v), out)
    torch.testing.assert_close(inline_attention(q, k, v + offset), out + offset)


def test_one_token_gets_its_own_value_and_a_zero_query_the_mean() -> None:
    q, k, v = (random(2, 3, 1, 8, seed=s) for s in range(3))
    torch.testing.assert_close(inline_attention(q, k, v), v)
    v = random(2, 3, 9, 8)
    out = inline_attention(torch.zeros(2, 3, 5, 8), random(2, 3, 9, 8, seed=1), v)
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand(-1, -1, 5, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_the_covariance_of_keys_with_a_large_offset(dtype: torch.dtype, autocast: bool) -> None:
    q, k, v = (random(1, 2, 512, 64, seed=s) for s in range(3))
    q, k, v = (x.to(dtype) for x in (q, k + 8, v))
    exact = published(q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = inline_attention(q, k, v)
    assert out.dtype == dtype
    assert relative_error(out, exact) < 4e-3


def test_under_autocast_fp32_stays_fp32() -> None:
    q, k, v = (random(1, 2, 32, 16, seed=s) + 10 for s in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = inline_attention(q, k, v)
    assert torch.equal(out, inline_attention(q, k, v))


@pytest.mark.parametrize(("factor", "offset"), [(1e4, 0), (1, 1e4), (300, 3e4)])
def test_large_inputs_stay_finite_and_right_in_fp32(factor: float, offset: float) -> None:
    q, k, v = (random(1, 2, 64, 16, seed=s) * factor for s in range(3))
    k, v = k + offset, v + offset
    exact = published(q.double(), k.double(), v.double())
    assert relative_error(inline_attention(q, k, v), exact) < 1e-3


def test_gradients_are_those_of_finite_differences() -> None:
    q = random(2, 2, 5, 3, dtype=torch.float64).requires_grad_()
    k, v = (random(2, 2, 7, 3, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(inline_attention, (q, k, v))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 5, 8)),
        ((1, 2, 4, 8), (1, 2, 4, 4), (1, 2, 4, 4)),
        ((1, 2, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)),
        ((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
        ((4, 8), (4, 8), (4, 8)),
        ((1, 2, 4, 8), (1, 2, 0, 8), (1, 2, 0, 8)),
    ],
)
def test_refuses_shapes_that_do_not_fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"q must be \[B, H, N, D\], k and v \[B, H, M, D\].*got q \[") as caught:
        inline_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert str(list(k)) in str(caught.value)


def test_compiles_without_a_break() -> None:
    q, k, v = (random(1, 2, 12, 8, seed=s) for s in range(3))
    compiled = torch.compile(inline_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), inline_attention(q, k, v))
