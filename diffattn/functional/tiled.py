"""Attention within the tiles of a grid (HyperTile, 2023, https://github.com/tfernd/HyperTile).

Shapes: B batch, H heads, N tokens of a grid of F frames (1 of a picture), h rows and w columns in row-major order, c
tokens without a position on it, M = N + c keys, D channels per head.
"""

from math import prod

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional.checks import check_grid, check_keys
from diffattn.functional.masks import additive_mask, key_mask_of
from diffattn.functional.tokens import Grid, Split


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    tiles: tuple[int, int],
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention in which a token of the grid sees the tokens of its own tile, and all those off the grid.

        O_i = softmax(s·q_i K_Tᵀ) V_T,   s = D^(-1/2), T: the tile of token i, and keys after those of the grid

    Rows and columns are divided as evenly as possible: some tiles may have one row or column more than others. Tiles do
    not overlap, and nothing is padded. In a video a tile reaches through all frames.

    The cost is O(N²·D / t²) for t x t tiles instead of O(N²·D).

    Args:
        q: queries of the grid's tokens [B, H, N, D], row-major.
        k, v: keys and values [B, H, N + c, D], first those of the grid.
        grid: (rows, columns), or (frames, rows, columns) of a video.
        tiles: how many along the rows and along the columns, 1 or more; at most the number of rows and of columns is
            used. (1, 1) is exact attention.
        key_mask: boolean (True: attended to) or additive, broadcast to [B, H, 1, N + c].

    Returns:
        Output [B, H, N, D], in the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit together, another number of queries than tokens of the grid, or no tiles.
    """
    check_keys("B, H, N, D", q, k, v)
    check_grid(grid, q.shape[2])
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"every token of the grid needs a key, got {q.shape[2]} queries and {k.shape[2]} keys")
    if min(tiles) < 1:
        raise ValueError(f"tiles must be 1 or more along each axis, got {'x'.join(map(str, tiles))}")
    tokens = prod(grid)
    mask = None if key_mask is None else key_mask_of(key_mask, k)
    return attend_in_tiles(q, k, v, grid, tiles, lambda x: (x[:, :, :tokens], x[:, :, tokens:]), mask)


def attend_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    tiles: tuple[int, int],
    split: Split,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`tiled_attention` with keys in any order; `split` separates those of the grid from the others.

    Args:
        key_mask: as in `tiled_attention`, [B or 1, H or 1, 1, M].
    """
    keys = [split(k), split(v)]
    if key_mask is not None:
        keys.append(split(additive_mask(key_mask, q.dtype).expand(q.shape[0], -1, -1, -1).mT))
    h, w = grid[-2:]
    q, *on_grid = (x.unflatten(2, (-1, h, w)) for x in (q, *(x for x, _ in keys)))  # [B, H, F, h, w, D]
    others = [x for _, x in keys]
    bands = []
    for top, rows, height in runs_of_tiles(h, tiles[0]):
        band = []
        for left, columns, width in runs_of_tiles(w, tiles[1]):
            block = [x[:, :, :, top : top + rows * height, left : left + columns * width] for x in (q, *on_grid)]
            band.append(_attend_in_equal_tiles(block, others, rows, columns))
        bands.append(band[0] if len(band) == 1 else torch.cat(band, dim=4))
    return (bands[0] if len(bands) == 1 else torch.cat(bands, dim=3)).flatten(2, 4)


def runs_of_tiles(length: int, tiles: int) -> list[tuple[int, int, int]]:
    """Tiles along an axis, as even as possible: (first token, number of tiles, tokens of each), the larger first."""
    tiles = min(tiles, length)
    size, larger = length // tiles, length % tiles
    runs = [(0, larger, size + 1), (larger * (size + 1), tiles - larger, size)]
    return [run for run in runs if run[1]]


def _attend_in_equal_tiles(block: list[Tensor], others: list[Tensor], rows: int, columns: int) -> Tensor:
    """The output of a part of the grid [B, H, F, h', w', D], from its q, k, v and perhaps mask, and those of the keys
    off the grid [B, H, c, D]."""
    shape = (block[0].shape[2], block[0].shape[3] // rows, block[0].shape[4] // columns)
    q, *keys = (_cut(x, rows, columns) for x in block)
    if not guard_or_false(others[0].shape[2] == 0):
        keys = [
            torch.cat((x, other.repeat_interleave(rows * columns, dim=0)), dim=2)
            for x, other in zip(keys, others, strict=True)
        ]
    mask = keys[2].mT if len(keys) > 2 else None
    return _joined(scaled_dot_product_attention(q, keys[0], keys[1], attn_mask=mask), rows, columns, shape)


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """[B, H, F, rows·a, columns·b, D] -> [B·rows·columns, H, F·a·b, D], tile after tile, row by row."""
    cells = x.unflatten(4, (columns, -1)).unflatten(3, (rows, -1))  # [B, H, F, rows, a, columns, b, D]
    return cells.permute(0, 3, 5, 1, 2, 4, 6, 7).flatten(4, 6).flatten(0, 2)


def _joined(x: Tensor, rows: int, columns: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `_cut`, for tiles of `shape` (F, a, b)."""
    cells = x.unflatten(0, (-1, rows, columns)).unflatten(4, shape)  # [B, rows, columns, H, F, a, b, D]
    return cells.permute(0, 3, 4, 1, 5, 2, 6, 7).flatten(5, 6).flatten(3, 4)
