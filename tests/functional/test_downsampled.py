"""Attention to downsampled keys as a function of tensors: the published numbers, its formula on any grid, what it must
refuse."""

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import Case, cases
from support.tensors import join, random, split
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from diffattn.functional import downsample_tokens, downsampled_attention

grids = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
)


def cells_of(grid: tuple[int, ...], factor: int) -> list[list[int]]:
    """The tokens of every cell, the first of them first, row by row and frame by frame."""
    h, w = grid[-2:]
    return [
        [(frame * h + y) * w + x for y in range(h)[top : top + factor] for x in range(w)[left : left + factor]]
        for frame, top, left in product(range(prod(grid[:-2])), range(0, h, factor), range(0, w, factor))
    ]


def formula(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], factor: int, pooled: bool, mask: Tensor | None = None
) -> Tensor:
    """Explicit weights of explicit cells; those of others are their own cells."""
    cells = cells_of(grid, factor)
    others = [[i] for i in range(prod(grid), k.shape[2])]
    chosen = [cell if pooled else cell[:1] for cell in (*cells, *others)]
    fewer_k, fewer_v = (torch.stack([x[:, :, cell].mean(2) for cell in chosen], dim=2) for x in (k, v))
    logits = q @ fewer_k.mT * q.shape[-1] ** -0.5
    if others:
        logits = logits + torch.tensor([len(cell) for cell in (*cells, *others)]).to(q.dtype).log()
    if mask is not None:
        masked = torch.stack([mask[..., cell].mean(-1) for cell in chosen], dim=-1)
        logits = logits + masked
    return logits.softmax(-1) @ fewer_v


@cases("todo_")
def test_matches_the_published_implementation(case: Case) -> None:
    p, w = case.params, case.tensors
    q, k, v = (split(linear(case["in.x"], w[f"w.to_{n}.weight"]), p["heads"]) for n in "qkv")
    out = downsampled_attention(q, k, v, (p["h"], p["w"]), p["factor"])
    case.assert_close(linear(join(out), w["w.to_out.0.weight"], w["w.to_out.0.bias"]), "out.y")
    x = case["in.x"][:, None]
    case.assert_close(downsample_tokens(x, (p["h"], p["w"]), p["factor"])[:, 0], "out.downsampled")


@pytest.mark.slow
@given(
    grid=grids,
    factor=st.integers(1, 5),
    pooled=st.booleans(),
    context=st.integers(0, 4),
    queries=st.integers(1, 9),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_equals_the_formula_with_explicit_cells(
    grid: tuple[int, ...], factor: int, pooled: bool, context: int, queries: int, masked: bool
) -> None:
    tokens = prod(grid) + context
    q = random(2, 2, queries, 4, dtype=torch.float64)
    k, v = (random(2, 2, tokens, 4, seed=s, dtype=torch.float64) for s in (1, 2))
    mask = torch.where(random(2, 1, 1, tokens, seed=3) > 0.3, -10_000.0, 0.0).double() if masked else None
    out = downsampled_attention(q, k, v, grid, factor, pooled=pooled, key_mask=mask)
    torch.testing.assert_close(out, formula(q, k, v, grid, factor, pooled, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_cells_of_one_token_are_exact_attention(context: int, pooled: bool) -> None:
    q, k, v = (random(2, 2, 35 + context, 8, seed=s) for s in range(3))
    out = downsampled_attention(q, k, v, (5, 7), 1, pooled=pooled)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("pooled", [False, True])
def test_where_the_tokens_of_a_cell_are_alike_nothing_is_lost(pooled: bool) -> None:
    """On an uneven grid too, if something stands beside it: cells then weigh what they hold."""
    place = torch.arange(5 * 7)
    cell = place // 7 // 2 * 4 + place % 7 // 2
    q = random(1, 2, 6, 8)
    k, v = (torch.cat((random(1, 2, 12, 8, seed=s)[:, :, cell], random(1, 2, 3, 8, seed=9 + s)), 2) for s in (1, 2))
    out = downsampled_attention(q, k, v, (5, 7), 2, pooled=pooled)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
def test_a_masked_key_has_no_say(kind: str) -> None:
    q, k, v = (random(1, 2, 20, 8, seed=s) for s in range(3))
    attended = torch.ones(20, dtype=torch.bool)
    attended[[0, 2, 17]] = False  # two of the grid's that stay, and one beside it
    low = {"boolean": 0.0, "additive": -10_000.0, "infinite": -torch.inf}[kind]
    mask = attended if kind == "boolean" else torch.zeros(20).masked_fill(~attended, low)
    out = downsampled_attention(q, k, v, (4, 4), 2, key_mask=mask)
    k, v = k.clone(), v.clone()
    k[:, :, ~attended], v[:, :, ~attended] = 7.0, 1e3
    torch.testing.assert_close(downsampled_attention(q, k, v, (4, 4), 2, key_mask=mask), out)
    mask = torch.zeros(20).masked_fill(torch.arange(20) < 16, -torch.inf)
    alone = scaled_dot_product_attention(q, k[:, :, 16:], v[:, :, 16:])
    torch.testing.assert_close(downsampled_attention(q, k, v, (4, 4), 2, key_mask=mask), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooled", [False, True])
def test_half_precision_is_near_double_precision(dtype: torch.dtype, pooled: bool) -> None:
    q, k, v = (random(2, 2, 38, 16, seed=s).to(dtype) for s in range(3))
    mask = torch.zeros(38).masked_fill(torch.arange(38) % 5 == 0, -torch.inf)
    out = downsampled_attention(q, k, v, (5, 7), 2, pooled=pooled, key_mask=mask)
    assert out.dtype == dtype
    exact = downsampled_attention(q.double(), k.double(), v.double(), (5, 7), 2, pooled=pooled, key_mask=mask)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=4 * step, rtol=4 * step)


@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_are_those_of_finite_differences(pooled: bool) -> None:
    inputs = tuple(random(1, 1, 8, 3, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return downsampled_attention(q, k, v, (2, 3), 2, pooled=pooled)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True])
def test_compiles_without_a_break_and_not_for_every_size(pooled: bool) -> None:
    compiled: Any = torch.compile(downsampled_attention, fullgraph=True, backend="eager")
    for grid in ((4, 6), (5, 7), (2, 5, 7)):
        q, k, v = (random(1, 2, prod(grid) + 3, 8, seed=s) for s in range(3))
        found = compiled(q, k, v, grid, 2, pooled=pooled)
        torch.testing.assert_close(found, downsampled_attention(q, k, v, grid, 2, pooled=pooled))


@pytest.mark.parametrize(("grid", "factor", "mask", "message"), [
    ((4, 4), 0, None, "factor must be 1 or more, got 0"),
    ((5, 4), 2, None, "a grid of 5x4 has 20 tokens, the tensor has 16"),
    ((0, 4), 2, None, "at least one row and one column, got 0x4"),
    ((4, 4), 2, torch.zeros(16, 16), r"key_mask must broadcast to \[B, H, 1, M\] = \[1, 2, 1, 16\], got \[16, 16\]"),
    ((4, 4), 2, torch.zeros(15), r"got \[15\]"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(grid: tuple[int, ...], factor: int, mask: Tensor | None, message: str) -> None:
    q, k, v = (random(1, 2, 16, 8, seed=s) for s in range(3))
    with pytest.raises(ValueError, match=message):
        downsampled_attention(q, k, v, grid, factor, key_mask=mask)


def test_tokens_that_are_not_the_grids_cannot_be_downsampled() -> None:
    with pytest.raises(ValueError, match="a grid of 3x3 has 9 tokens, the tensor has 8"):
        downsample_tokens(random(1, 1, 8, 2), (3, 3), 2)
    with pytest.raises(ValueError, match=r"q must be \[B, H, N, D\]"):
        downsampled_attention(random(1, 8, 2), random(1, 8, 2), random(1, 8, 2), (2, 4), 2)
