"""Attention within tiles as a function of tensors: against a mask of all pairs of tokens, on any grid."""

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import tiled_attention
from diffattn.functional.tiled import runs_of_tiles

grids = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
)
counts = st.tuples(st.integers(1, 5), st.integers(1, 5))


def tile_along(length: int, tiles: int) -> Tensor:
    """The tile of every token along an axis, as `torch.tensor_split` divides it."""
    parts = torch.arange(length).tensor_split(min(tiles, length))
    return torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])


def who_sees_whom(grid: tuple[int, ...], tiles: tuple[int, int], context: int) -> Tensor:
    """[N, N + c]"""
    rows, columns = (tile_along(*pair) for pair in zip(grid[-2:], tiles, strict=True))
    tile = (rows[:, None] * 100 + columns).flatten().repeat(prod(grid[:-2]))
    return torch.cat((tile[:, None] == tile, torch.ones(len(tile), context, dtype=torch.bool)), dim=1)


@pytest.mark.slow
@given(grid=grids, tiles=counts, context=st.integers(0, 4), masked=st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_token_sees_its_tile_and_what_has_no_place(
    grid: tuple[int, ...], tiles: tuple[int, int], context: int, masked: bool
) -> None:
    tokens = prod(grid)
    q = random(2, 2, tokens, 4, dtype=torch.float64)
    k, v = (random(2, 2, tokens + context, 4, seed=s, dtype=torch.float64) for s in (1, 2))
    seen = torch.zeros(tokens, tokens + context).masked_fill(~who_sees_whom(grid, tiles, context), -torch.inf)
    mask = torch.where(random(2, 1, 1, tokens + context, seed=3) > 0.5, -10_000.0, 0.0) if masked else None
    out = tiled_attention(q, k, v, grid, tiles, key_mask=mask)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=(seen if mask is None else seen + mask).double())
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(6, 7), (2, 3, 7)])
@pytest.mark.parametrize("context", [0, 3])
def test_one_tile_is_exact_attention(grid: tuple[int, ...], context: int) -> None:
    q, k, v = (random(2, 2, 42 + context, 8, seed=s) for s in range(3))
    torch.testing.assert_close(
        tiled_attention(q[:, :, :42], k, v, grid, (1, 1)), scaled_dot_product_attention(q[:, :, :42], k, v)
    )


def test_every_tile_by_itself() -> None:
    q, k, v = (random(1, 2, 6 * 8, 8, seed=s) for s in range(3))
    out = tiled_attention(q, k, v, (6, 8), (2, 2)).unflatten(2, (6, 8))
    for top in (0, 3):
        for left in (0, 4):
            a, b, c = (x.unflatten(2, (6, 8))[:, :, top : top + 3, left : left + 4].flatten(2, 3) for x in (q, k, v))
            part = out[:, :, top : top + 3, left : left + 4].flatten(2, 3)
            torch.testing.assert_close(part, scaled_dot_product_attention(a, b, c))


@given(length=st.integers(1, 40), tiles=st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_tiles_along_an_axis_are_as_even_as_can_be(length: int, tiles: int) -> None:
    runs = runs_of_tiles(length, tiles)
    sizes = [size for _, number, size in runs for _ in range(number)]
    assert sizes == [len(part) for part in torch.arange(length).tensor_split(min(tiles, length))]
    assert [first for first, _, _ in runs] == [0, *(n * size for _, n, size in runs[:-1])]


def test_a_tile_of_masked_keys_stays_finite() -> None:
    """As where a part of the picture is padding: nobody asks for its output, but it must not spread."""
    q, k, v = (random(1, 2, 16, 8, seed=s) for s in range(3))
    attended = torch.arange(16) % 4 < 2
    for mask in (attended, torch.zeros(16).masked_fill(~attended, -torch.inf)):
        out = tiled_attention(q, k, v, (4, 4), (2, 2), key_mask=mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, :, attended], tiled_attention(q, k, v, (4, 4), (2, 2))[:, :, attended])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_double_precision(dtype: torch.dtype) -> None:
    q, k, v = (random(2, 2, 38, 16, seed=s).to(dtype) for s in range(3))
    out = tiled_attention(q[:, :, :35], k, v, (5, 7), (2, 3))
    assert out.dtype == dtype
    exact = tiled_attention(q[:, :, :35].double(), k.double(), v.double(), (5, 7), (2, 3))
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=4 * step, rtol=4 * step)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = tuple(random(1, 1, n, 3, seed=s, dtype=torch.float64).requires_grad_() for s, n in enumerate((6, 8, 8)))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiled_attention(q, k, v, (2, 3), (1, 2))

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    compiled: Any = torch.compile(tiled_attention, fullgraph=True, backend="eager", dynamic=False)
    for grid in ((4, 6), (5, 7), (2, 5, 7)):
        q, k, v = (random(1, 2, prod(grid) + 3, 8, seed=s) for s in range(3))
        q = q[:, :, : prod(grid)]
        torch.testing.assert_close(compiled(q, k, v, grid, (2, 3)), tiled_attention(q, k, v, grid, (2, 3)))


@pytest.mark.parametrize(("grid", "tiles", "keys", "message"), [
    ((4, 4), (0, 2), 16, "tiles must be 1 or more along each axis, got 0x2"),
    ((5, 4), (2, 2), 20, "a grid of 5x4 has 20 tokens, the tensor has 16"),
    ((4, 4), (2, 2), 15, "every token of the grid needs a key, got 16 queries and 15 keys"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(grid: tuple[int, ...], tiles: tuple[int, int], keys: int, message: str) -> None:
    k, v = (random(1, 2, keys, 8, seed=s) for s in (1, 2))
    with pytest.raises(ValueError, match=message):
        tiled_attention(random(1, 2, 16, 8), k, v, grid, tiles)
