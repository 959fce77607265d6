"""Mamba-like linear attention as a function of tensors: the published numbers, its formula, the rotation, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.linear_family import FamilyCase, family_cases
from support.tensors import as_image, as_tokens, join, random, split
from torch import Tensor
from torch.nn.functional import conv2d, elu, linear

from diffattn.functional import mamba_like_linear_attention
from diffattn.functional.mamba_like import rotate

GRIDS = [(4, 4), (3, 5), (1, 7), (6, 1), (1, 1)]


def complex_rotation(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pairs as complex numbers times e^(i·angle), as published."""
    h, w = grid
    quarter = x.shape[-1] // 4
    theta = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(h, dtype=torch.float64)[:, None, None] * theta
    column = torch.arange(w, dtype=torch.float64)[None, :, None] * theta
    angle = torch.cat((row.expand(h, w, -1), column.expand(h, w, -1)), dim=-1).flatten(0, 1)  # [N, C/2]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2)


def formula(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """Explicit weights [B, H, N, N]."""
    q, k = elu(q) + 1, elu(k) + 1
    turned = split(complex_rotation(q, grid), heads) @ split(complex_rotation(k, grid), heads).mT
    total = (split(q, heads) @ split(k, heads).mT).mean(dim=-1, keepdim=True)
    return join(turned / q.shape[1] / (total + 1e-6) @ split(v, heads))


def _convolved(x: Tensor, weights: dict[str, Tensor], name: str, grid: tuple[int, int]) -> Tensor:
    image = as_image(x, grid)
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return as_tokens(conv2d(image, weight, bias, padding=1, groups=image.shape[1]))


@family_cases("mlla_attn_")
def test_the_layer_matches_the_published_implementation(case: FamilyCase) -> None:
    w, x = case.weights(), case.input()
    q, k = linear(x, w["qk.weight"], w["qk.bias"]).chunk(2, dim=-1)
    core = mamba_like_linear_attention(q, k, x, grid=case.grid, num_heads=case.params["heads"])
    case.assert_matches(x, core + _convolved(x, w, "lepe", case.grid))


@family_cases("mlla_block_")
def test_the_attention_of_the_block_matches_the_published_implementation(case: FamilyCase) -> None:
    w, x = case.weights("attn."), case["mid.attn_in"]
    q, k = linear(x, w["qk.weight"], w["qk.bias"]).chunk(2, dim=-1)
    core = mamba_like_linear_attention(q, k, x, grid=case.grid, num_heads=case.params["heads"])
    case.assert_close(core + _convolved(x, w, "lepe", case.grid), "mid.attn_out")


@family_cases("mlla_attn_")
def test_the_rotation_is_the_published_table(case: FamilyCase) -> None:
    cos, sin = case["w.rope.rotations"].flatten(0, 1).unbind(-1)  # [N, C/2]
    unit = torch.tensor([1.0, 0.0]).repeat(cos.shape[-1]).expand(1, len(cos), -1)
    even, odd = rotate(unit, case.grid)[0].unflatten(-1, (-1, 2)).unbind(-1)
    torch.testing.assert_close(even, cos, **case.tolerance)
    torch.testing.assert_close(odd, sin, **case.tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@given(heads=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_equals_the_formula_with_explicit_weights(grid: tuple[int, int], heads: int, seed: int) -> None:
    q, k, v = (random(2, grid[0] * grid[1], 12, seed=seed + s, dtype=torch.float64) for s in (0, 11, 12))
    out = mamba_like_linear_attention(q, k, v, grid=grid, num_heads=heads)
    torch.testing.assert_close(out, formula(q, k, v, grid, heads), rtol=1e-9, atol=1e-9)


@given(h=st.integers(1, 9), w=st.integers(1, 9), dy=st.integers(0, 3), dx=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_products_of_rotated_tokens_depend_on_their_distance_alone(h: int, w: int, dy: int, dx: int) -> None:
    grid = (h + dy, w + dx)
    x, y = (random(1, 1, 8, seed=s, dtype=torch.float64).expand(1, grid[0] * grid[1], -1) for s in (1, 2))
    products = (rotate(x, grid) @ rotate(y, grid).mT)[0].unflatten(-1, grid).unflatten(0, grid)  # query, key
    torch.testing.assert_close(products[0, 0, dy, dx], products[h - 1, w - 1, h - 1 + dy, w - 1 + dx])
    torch.testing.assert_close(rotate(x, grid).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["negative", "zero", "large", "offset"])
def test_finite_with_gradients_in_every_precision(dtype: torch.dtype, kind: str) -> None:
    x = random(1, 15, 16, seed=3)
    q = {"negative": -x.abs() * 50 - 100, "zero": x * 0, "large": x.clamp(-3, 3) * 1e4, "offset": x + 1e4}[kind]
    inputs = [t.to(dtype).requires_grad_() for t in (q, q.roll(1, 1), x)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = mamba_like_linear_attention(*inputs, grid=(3, 5), num_heads=2)
    assert out.dtype == dtype
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.float().sum(), inputs):
        assert grad.isfinite().all()


def test_half_precision_is_as_near_as_its_inputs() -> None:
    q, k, v = (random(1, 60, 32, seed=s).bfloat16() for s in range(3))
    out = mamba_like_linear_attention(q, k, v, grid=(6, 10), num_heads=4)
    exact = formula(q.double(), k.double(), v.double(), (6, 10), 4)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, mamba_like_linear_attention(q, k, v, grid=(6, 10), num_heads=4))


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (random(1, 6, 8, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mamba_like_linear_attention(q, k, v, grid=(2, 3), num_heads=2)

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize(
    ("grid", "heads", "channels", "message"),
    [
        ((2, 3), 2, 8, "a grid of 2x3 has 6 tokens, the tensor has 4"),
        ((-2, -2), 2, 8, "at least one row and one column, got -2x-2"),
        ((2, 2), 3, 8, "num_heads must divide the 8 channels, got 3"),
        ((2, 2), 2, 6, "multiple of 4 channels, got 6"),
    ],
)
def test_refuses_what_does_not_fit(grid: tuple[int, int], heads: int, channels: int, message: str) -> None:
    x = torch.zeros(1, 4, channels)
    with pytest.raises(ValueError, match=message):
        mamba_like_linear_attention(x, x, x, grid=grid, num_heads=heads)


def test_refuses_keys_that_are_not_those_of_the_grid() -> None:
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=r"q, k, v must all be \[B, N, C\], got q \[1, 4, 8\], k \[1, 2, 8\]"):
        mamba_like_linear_attention(x, x[:, :2], x[:, :2], grid=(2, 2), num_heads=2)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    q, k, v = (random(1, 6, 8, seed=s) for s in range(3))
    compiled = torch.compile(mamba_like_linear_attention, fullgraph=True, backend="eager")
    found = compiled(q, k, v, grid=(2, 3), num_heads=2)
    torch.testing.assert_close(found, mamba_like_linear_attention(q, k, v, grid=(2, 3), num_heads=2))
