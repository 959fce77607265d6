"""Attention of every query to fewer keys and values (Smith et al., "ToDo: Token Downsampling for Efficient Generation
of High-Resolution Images", 2024, arXiv 2402.13573).

Shapes: B batch, H heads, N tokens of a grid in row-major order, n cells of that grid, c tokens off it, M = N + c keys,
D channels per head, f the factor.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.functional import pad, scaled_dot_product_attention

from diffattn.functional.checks import check_grid, check_keys
from diffattn.functional.masks import additive_mask, key_mask_of
from diffattn.functional.tokens import Grid, Split, pooled_on_grid


def downsampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    factor: int,
    *,
    pooled: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention to one key and value for every cell of f x f tokens.

        O = softmax(s·Q K̃ᵀ + b) Ṽ,   s = D^(-1/2), K̃ and Ṽ: K and V at every f-th row and column

    Keys after the N of the grid, such as those of text, are all kept. A key of the grid then represents its whole cell,
    other keys only themselves, so b is the logarithm of the number of tokens in the cell: without it, text would weigh
    up to f² times too much. Where all keys are on the grid, b is left out, as published: it would be the same for all
    cells except smaller ones at the far edges of a grid that f does not divide.

    The cost is O(N²·D / f²) instead of O(N²·D).

    Args:
        q: queries [B, H, any number, D].
        k, v: keys and values [B, H, N + c, D], first those of the grid, row-major.
        grid: (rows, columns), or (frames, rows, columns) of a video, in which frames stay apart.
        factor: f, 1 or more; 1 is exact attention.
        pooled: whether K̃ and Ṽ are means over the cells, instead of their first tokens. The mean of keys that carry
            their position as a rotation is not the key of any position.
        key_mask: boolean (True: attended to) or additive, broadcast to [B, H, 1, N + c]. It is reduced as keys are.

    Returns:
        Output [B, H, as many as q, D], in the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit together, more tokens on the grid than keys, or a factor below 1.
    """
    check_keys("B, H, N, D", q, k, v)
    tokens = prod(grid)
    check_grid(grid, min(tokens, k.shape[2]))
    check_factor(factor)
    mask = None if key_mask is None else key_mask_of(key_mask, k)
    return attend_to_cells(
        q, k, v, Cells((grid,), factor, pooled), lambda x: (x[:, :, :tokens], x[:, :, tokens:]), mask
    )


def attend_to_cells(
    q: Tensor, k: Tensor, v: Tensor, cells: "Cells", split: Split, key_mask: Tensor | None = None
) -> Tensor:
    """`downsampled_attention` over several grids, and others in any order.

    Args:
        q: queries [B, H, any number, D].
        k, v: keys and values [B, H, M, D].
        cells: how tokens on grids are reduced.
        split: separates the tokens on grids from the others.
        key_mask: as in `downsampled_attention`, [B or 1, H or 1, 1, M].
    """
    bias = None if key_mask is None else cells.reduce(*split(additive_mask(key_mask, q.dtype).mT)).mT
    (k, context), (v, others) = split(k), split(v)
    if not guard_or_false(context.shape[2] == 0):
        sizes = cells.log_sizes(q)
        sizes = torch.cat((sizes, sizes.new_zeros(context.shape[2])))[None, None, None]  # [1, 1, 1, n + c]
        bias = sizes if bias is None else bias + sizes
    return scaled_dot_product_attention(q, cells.reduce(k, context), cells.reduce(v, others), attn_mask=bias)


def downsample_tokens(x: Tensor, grid: Grid, factor: int, *, pooled: bool = False) -> Tensor:
    """The first token of every cell of f x f tokens, or the mean of them all.

    Args:
        x: tokens [B, H, N, D], row-major on `grid`.
        grid: (rows, columns), or (frames, rows, columns) of a video, in which frames stay apart.
        factor: f, 1 or more. Where it does not divide rows or columns, the cells at their far ends are smaller.
        pooled: whether to take means.

    Returns:
        Tokens [B, H, n, D], row-major; n = ceil(rows / f)·ceil(columns / f) for every frame.

    Raises:
        ValueError: the grid does not match the tokens, or a factor below 1.
    """
    check_grid(grid, x.shape[2])
    check_factor(factor)
    h, w = grid[-2:]
    if not pooled:
        return x.unflatten(2, (-1, h, w))[:, :, :, ::factor, ::factor].flatten(2, 4)
    if h % factor == 0 and w % factor == 0:
        if len(grid) == 2:
            return pooled_on_grid(x, (h, w), (h // factor, w // factor))
        return x.unflatten(2, (-1, h // factor, factor, w // factor, factor)).mean(dim=(4, 6)).flatten(2, 4)
    whole = pad(x.unflatten(2, (-1, h, w)), (0, 0, 0, -w % factor, 0, -h % factor))
    sums = whole.unflatten(4, (-1, factor)).unflatten(3, (-1, factor)).sum(dim=(4, 6)).flatten(2, 4)
    return (sums / cell_sizes(grid, factor, x.device)[:, None]).to(x.dtype)


@dataclass(frozen=True)
class Cells:
    """How the tokens of some grids are reduced, one grid after the other."""

    grids: tuple[Grid, ...]
    factor: int
    pooled: bool = False

    def reduce(self, on_grids: Tensor, others: Tensor) -> Tensor:
        """[B, H, N, D] and [B, H, c, D] -> [B, H, n + c, D]."""
        sizes = [prod(grid) for grid in self.grids]
        parts = zip(on_grids.split(sizes, dim=2), self.grids, strict=True)
        fewer = [downsample_tokens(part, grid, self.factor, pooled=self.pooled) for part, grid in parts]
        if len(fewer) == 1 and guard_or_false(others.shape[2] == 0):
            return fewer[0]
        return torch.cat((*fewer, others), dim=2)

    def log_sizes(self, like: Tensor) -> Tensor:
        """Logarithms of the number of tokens that each represents [n], in the dtype and on the device of a tensor."""
        return torch.cat([cell_sizes(grid, self.factor, like.device) for grid in self.grids]).to(like.dtype).log()


@lru_cache(maxsize=256)
def cell_sizes(grid: Grid, factor: int, device: torch.device) -> Tensor:
    """Number of tokens in every cell of f x f, in the order of `downsample_tokens` [n], fp32."""
    with torch.inference_mode(False):
        rows, columns = (
            (length - torch.arange(0, length, factor, device=device)).clamp(max=factor) for length in grid[-2:]
        )
        return (rows[:, None] * columns).flatten().repeat(prod(grid[:-2])).float()


def check_factor(factor: int) -> None:
    """Raise `ValueError` for a factor below 1."""
    if factor < 1:
        raise ValueError(f"factor must be 1 or more, got {factor}")
