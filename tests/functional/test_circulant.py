"""Circulant attention as a function of tensors: the published numbers, its sums written out, shifts, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.linear_family import FamilyCase, family_cases
from support.tensors import as_image, as_tokens, random
from torch import Tensor
from torch.nn.functional import linear, silu

from diffattn.functional import circulant_attention

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


def sums(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every shift by itself."""
    q, k, v = (as_image(x, grid) for x in (q, k, v))
    shifts = [(-y, -x) for y in range(grid[0]) for x in range(grid[1])]
    total = grid[0] * grid[1]
    logits = torch.stack([(q * k.roll(shift, (-2, -1))).sum((-2, -1)) for shift in shifts], dim=-1) * total**-0.5
    weights = logits.softmax(dim=-1)  # [B, C, N]
    moved = torch.stack([v.roll(shift, (-2, -1)) for shift in shifts], dim=-1)  # [B, C, h, w, N]
    return as_tokens((moved * weights[:, :, None, None]).sum(-1))


def _layer(case: FamilyCase, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the output projection, and what comes out."""
    w = case.weights(prefix)
    q, k, v = linear(x, w["qkv.weight"]).chunk(3, dim=-1)
    gate = silu(linear(x, w["gate.0.weight"], w["gate.0.bias"]))
    before = circulant_attention(q, k, v, grid=case.grid) * gate
    return before, linear(before, w["proj.weight"], w["proj.bias"])


@family_cases("circulant_8x8", "circulant_7x7", "circulant_6x10")
def test_the_layer_matches_the_published_implementation(case: FamilyCase) -> None:
    x = case.input()
    before, out = _layer(case, "", x)
    case.assert_close(before, "mid.pre_proj")
    case.assert_matches(x, out)


@family_cases("circulant_block")
def test_the_attention_of_the_block_matches_the_published_implementation(case: FamilyCase) -> None:
    case.assert_close(_layer(case, "attn.", case["mid.attn_in"])[1], "mid.attn_out")


@given(grid=grids, batch=st.integers(1, 2), channels=st.integers(1, 5), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_equals_the_sums_over_shifts(grid: tuple[int, int], batch: int, channels: int, seed: int) -> None:
    q, k, v = (random(batch, grid[0] * grid[1], channels, seed=seed + s, dtype=torch.float64) for s in (0, 11, 12))
    out = circulant_attention(q, k, v, grid=grid)
    torch.testing.assert_close(out, sums(q, k, v, grid), rtol=1e-9, atol=1e-9)


@given(grid=grids, dy=st.integers(0, 6), dx=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_a_moved_picture_gives_a_moved_output(grid: tuple[int, int], dy: int, dx: int) -> None:
    q, k, v = (random(1, grid[0] * grid[1], 3, seed=s, dtype=torch.float64) for s in range(3))

    def moved(x: Tensor) -> Tensor:
        return x.unflatten(1, grid).roll((dy, dx), (1, 2)).flatten(1, 2)

    out = circulant_attention(q, k, v, grid=grid)
    torch.testing.assert_close(circulant_attention(moved(q), moved(k), moved(v), grid=grid), moved(out))


def test_an_offset_of_the_keys_changes_nothing_in_any_precision() -> None:
    q, k, v = (random(1, 60, 8, seed=s, dtype=torch.float64) for s in range(3))
    exact = circulant_attention(q, k, v, grid=(6, 10))
    torch.testing.assert_close(circulant_attention(q, k + 1e4, v, grid=(6, 10)), exact)
    far = circulant_attention(q.float(), k.float() + 1024, v.float(), grid=(6, 10))
    torch.testing.assert_close(far.double(), exact, atol=2e-3, rtol=2e-3)  # what fp32 keys at 1024 can tell


def test_output_lies_between_the_values_and_one_token_is_its_own() -> None:
    q, k, v = (random(2, 35, 4, seed=s) for s in range(3))
    out = circulant_attention(q, k, v, grid=(5, 7))
    assert (out <= v.amax(1, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-5).all()
    torch.testing.assert_close(circulant_attention(q[:, :1], k[:, :1], v[:, :1], grid=(1, 1)), v[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(3, 5), (1, 15), (15, 1)])
@pytest.mark.parametrize("kind", ["zero", "large", "offset"])
def test_finite_with_gradients_in_every_precision(dtype: torch.dtype, grid: tuple[int, int], kind: str) -> None:
    x = random(1, 15, 4, seed=3)
    q = {"zero": x * 0, "large": x.clamp(-3, 3) * 2e4, "offset": x + 1e4}[kind]
    inputs = [t.to(dtype).requires_grad_() for t in (q, q.roll(1, 1), x)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = circulant_attention(*inputs, grid=grid)
    assert out.dtype == dtype
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.float().sum(), inputs):
        assert grad.isfinite().all()


def test_half_precision_is_as_near_as_its_inputs() -> None:
    q, k, v = (random(1, 60, 8, seed=s).bfloat16() for s in range(3))
    out = circulant_attention(q, k, v, grid=(6, 10))
    exact = sums(q.double(), k.double(), v.double(), (6, 10))
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, circulant_attention(q, k, v, grid=(6, 10)))


@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (1, 4)])
def test_gradients_are_those_of_finite_differences(grid: tuple[int, int]) -> None:
    q, k, v = (random(1, grid[0] * grid[1], 2, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return circulant_attention(q, k, v, grid=grid)

    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_refuses_what_does_not_fit() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match="a grid of 2x2 has 4 tokens, the tensor has 6"):
        circulant_attention(x, x, x, grid=(2, 2))
    with pytest.raises(ValueError, match=r"q, k, v must all be \[B, N, C\].*v \[1, 3, 4\]"):
        circulant_attention(x, x, x[:, :3], grid=(2, 3))
    with pytest.raises(ValueError, match=r"must all be \[B, N, C\], got q \[6, 4\]"):
        circulant_attention(x[0], x[0], x[0], grid=(2, 3))


def test_compiles_without_a_break() -> None:
    q, k, v = (random(1, 6, 4, seed=s) for s in range(3))
    compiled = torch.compile(circulant_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, grid=(2, 3)), circulant_attention(q, k, v, grid=(2, 3)))
