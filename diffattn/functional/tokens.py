"""Reduces the number of tokens: pooling over the grid, and merging by similarity.

Shapes: B batch, H heads, N = h·w image tokens in row-major order on a grid (h, w), D channels per head,
C channels, S destination tokens, R = N - S source tokens, r merged source tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

from diffattn.functional.checks import check_grid

Grid = tuple[int, ...]

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[B, H, M, D] -> the tokens with a position on a grid [B, H, N, D], and those without [B, H, c, D]."""


def coarser_grid(grid: Grid, num_tokens: int) -> Grid:
    """About `num_tokens` tokens in the proportions of a grid of any number of dimensions.

    Raises:
        ValueError: `num_tokens` is not between 1 and the number of tokens of the grid.
    """
    total = prod(grid)
    if not 1 <= num_tokens <= total:
        text = "x".join(map(str, grid))
        raise ValueError(f"num_tokens must be between 1 and {total} on a {text} grid, got {num_tokens}")
    coarse: list[int] = []
    for i, length in enumerate(grid):
        left, dims = num_tokens // prod(coarse), len(grid) - i
        share = left if dims == 1 else round((left / prod(grid[i:])) ** (1 / dims) * length)
        coarse.append(min(max(share, 1), length, max(left, 1)))
    return tuple(coarse)


def pooled_grid(grid: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Rows and columns of about `num_tokens` pooled tokens, in the aspect ratio of the grid.

    Raises:
        ValueError: `num_tokens` is not between 1 and the number of tokens of the grid.
    """
    h, w = grid
    if not 1 <= num_tokens <= h * w:
        raise ValueError(f"num_tokens must be between 1 and {h * w} on a {h}x{w} grid, got {num_tokens}")
    rows = min(max(round((num_tokens * h / w) ** 0.5), 1), h)
    columns = min(max(num_tokens // rows, 1), w)
    return rows, columns


def pool_tokens(x: Tensor, grid: tuple[int, int], num_tokens: int) -> Tensor:
    """Average-pool tokens over their grid, as adaptive average pooling does.

    Args:
        x: tokens [B, H, N, D], row-major on `grid`.
        grid: (h, w) with h·w = N.
        num_tokens: the number wanted; `pooled_grid` gives the rows and columns, so that a perfect square on a
            square grid gives √n × √n, and any other number the nearest that fits the aspect ratio.

    Returns:
        Pooled tokens [B, H, n, D], n = rows·columns, row-major.

    Raises:
        ValueError: the grid does not match the tokens, or `num_tokens` is out of range.
    """
    check_grid(grid, x.shape[2])
    return pooled_on_grid(x, grid, pooled_grid(grid, num_tokens))


def pooled_on_grid(x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Means over `cells` [rows, columns] of the grid: [B, H, h·w, D] -> [B, H, rows·columns, D].

    All heads are pooled as the channels of one image that lie side by side in memory: in bf16 on a CPU four to ten
    times as fast as means over a view of the cells. Equal cells have a faster kernel than adaptive ones.
    """
    heads, dim = x.shape[1], x.shape[3]
    image = x.transpose(1, 2).flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
    (h, w), (rows, columns) = grid, cells
    if h % rows == 0 and w % columns == 0:
        pooled = avg_pool2d(image, (h // rows, w // columns))
    else:
        pooled = adaptive_avg_pool2d(image, cells)
    # Contiguous: attention is several times slower on tokens whose channels are not adjacent in memory.
    return pooled.permute(0, 2, 3, 1).unflatten(3, (heads, dim)).flatten(1, 2).transpose(1, 2).contiguous()


def pick_tokens(x: Tensor, grid: Grid, num_tokens: int) -> Tensor:
    """One token near the middle of every cell of a coarser grid, unchanged, so that a rotation that encodes its
    position stays intact; `sample_tokens` averages four.

    Args:
        x: tokens [B, H, N, D], row-major on `grid`.
        grid: (rows, columns) or (frames, rows, columns), with N tokens.
        num_tokens: the number wanted; `coarser_grid` gives how many along each dimension.

    Returns:
        Tokens [B, H, n, D], row-major.

    Raises:
        ValueError: the grid does not match the tokens, or `num_tokens` is out of range.
    """
    if prod(grid) != x.shape[2]:
        raise ValueError(f"grid {'x'.join(map(str, grid))} does not match {x.shape[2]} tokens")
    return x.index_select(2, _middles(grid, coarser_grid(grid, num_tokens), x.device))


@lru_cache(maxsize=256)
def _middles(grid: Grid, coarse: Grid, device: torch.device) -> Tensor:
    """Position of the token in the middle of every cell [n]."""
    with torch.inference_mode(False):
        places = torch.zeros(1, dtype=torch.long, device=device)
        for length, cells in zip(grid, coarse, strict=True):
            middle = (2 * torch.arange(cells, device=device) + 1) * length // (2 * cells)
            places = (places[:, None] * length + middle).flatten()
        return places


def sample_tokens(x: Tensor, grid: tuple[int, int], num_tokens: int) -> Tensor:
    """The middle of every cell of a coarser grid: the mean of the 2x2 tokens around its centre.

    Unlike the mean over whole cells (`pool_tokens`) this keeps the spread of the tokens, which landmarks need:
    averaging all tokens of a cell removes sharp detail.

    Args:
        x: tokens [B, H, N, D], row-major on `grid`.
        grid: (h, w) with h·w = N.
        num_tokens: the number wanted; `pooled_grid` gives the rows and columns, as for `pool_tokens`.

    Returns:
        Tokens [B, H, n, D], n = rows·columns, row-major. Along an axis with fewer than two tokens per cell, only the
        middle token is used.

    Raises:
        ValueError: the grid does not match the tokens, or `num_tokens` is out of range.
    """
    h, w = grid
    check_grid(grid, x.shape[2])
    rows, columns = pooled_grid(grid, num_tokens)
    if h % rows == 0 and w % columns == 0:  # equal cells: slices, several times as fast as a gather
        cells = x.unflatten(2, (rows, h // rows, columns, w // columns))
        down, right = _inner(h // rows), _inner(w // columns)
        inner = cells[:, :, :, down[0] : down[-1] + 1, :, right[0] : right[-1] + 1]
        return _mean_of_few(inner).flatten(2, 3)
    places = _corners(grid, (rows, columns), x.device)
    return x.index_select(2, places.flatten()).unflatten(2, places.shape).mean(dim=2)


def _mean_of_few(x: Tensor) -> Tensor:
    """[B, H, r, 1 or 2, c, 1 or 2, D] -> [B, H, r, c, D]. A single operation, but on a CPU, whose reductions over so
    few elements are slow, two that take a twentieth of the time."""
    if x.device.type != "cpu":
        return x.mean(dim=(3, 5))
    x = torch.lerp(x[:, :, :, 0], x[:, :, :, 1], 0.5) if x.shape[3] > 1 else x[:, :, :, 0]
    return torch.lerp(x[:, :, :, :, 0], x[:, :, :, :, 1], 0.5) if x.shape[4] > 1 else x[:, :, :, :, 0]


@lru_cache(maxsize=256)
def _corners(grid: tuple[int, int], coarse: tuple[int, int], device: torch.device) -> Tensor:
    """Positions of the tokens around the centre of every cell [1, 2 or 4, n]."""
    with torch.inference_mode(False):
        corners = [
            (row[:, None] * grid[1] + column).flatten()
            for row in _middle(grid[0], coarse[0], device)
            for column in _middle(grid[1], coarse[1], device)
        ]
        return torch.stack(corners)


def _inner(length: int) -> tuple[int, ...]:
    """The two positions around the centre of a cell, or its only one."""
    first = (length - 1) // 2
    return (first, first + 1) if length > 1 else (first,)


def _middle(length: int, cells: int, device: torch.device) -> tuple[Tensor, ...]:
    """Positions [cells] of the two tokens around the centre of each cell; of one, if cells are shorter than two."""
    centre = (2 * torch.arange(cells, device=device) + 1) * length  # in units of 1 / (2·cells)
    if length < 2 * cells:
        return (centre // (2 * cells),)
    first = (centre - cells) // (2 * cells)
    return first, first + 1


@dataclass(frozen=True)
class Matching:
    """Which source token merges into which destination token (Bolya & Hoffman, "Token Merging for Fast Stable
    Diffusion", CVPR-W 2023), best pairs first. Made by `match_tokens`, used by `merge_tokens`.

    Attributes:
        sources: grid positions of the source tokens [B, R], most similar to their destination first.
        targets: for each source in that order, the index of its destination among the destinations [B, R].
        destinations: grid positions of the destination tokens [S], ascending.
    """

    sources: Tensor
    targets: Tensor
    destinations: Tensor

    @property
    def max_merged(self) -> int:
        """The largest number of tokens that can be merged away: all the sources."""
        return self.sources.shape[1]


def match_tokens(
    metric: Tensor,
    grid: tuple[int, int],
    stride: tuple[int, int],
    generator: torch.Generator | None = None,
) -> Matching:
    """Pair every token with its most similar destination; one destination per full stride×stride cell.

    Args:
        metric: the tensor on which cosine similarity is measured [B, N, C]. An all-zero token has no similarity.
        grid: (h, w) with h·w = N.
        stride: (sy, sx), the size of a cell.
        generator: draws the destination inside each cell; without one it is the cell's top-left token.

    Raises:
        ValueError: the grid does not match the tokens, or holds no full cell.
    """
    batch, tokens, _ = metric.shape
    h, w = grid
    sy, sx = stride
    check_grid(grid, tokens)
    if not (1 <= sy <= h and 1 <= sx <= w) or sy * sx == 1:
        raise ValueError(f"stride must leave a full cell of several tokens on a {h}x{w} grid, got {sy}x{sx}")
    if generator is None:
        destinations, sources = _corners_of_cells(grid, stride, metric.device)
    else:
        destinations, sources = _split(_drawn_in_cells(grid, stride, generator), tokens, metric.device)
    unit = normalize(metric.float(), dim=-1).to(metric.dtype)  # norms in fp32: small half-precision ones are 0
    similarity = unit[:, sources] @ unit[:, destinations].transpose(1, 2)  # [B, R, S]
    best, target = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)  # [B, R]
    return Matching(sources.expand(batch, -1).gather(1, order), target.gather(1, order), destinations)


@lru_cache(maxsize=256)
def _corners_of_cells(grid: tuple[int, int], stride: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the top-left tokens of all full cells [S], and of all other tokens [R]."""
    (h, w), (sy, sx) = grid, stride
    corners = [row * w + column for row in range(0, h - sy + 1, sy) for column in range(0, w - sx + 1, sx)]
    with torch.inference_mode(False):
        return _split(corners, h * w, device)


def _drawn_in_cells(grid: tuple[int, int], stride: tuple[int, int], generator: torch.Generator) -> list[int]:
    """Position of one token per full cell."""
    (h, w), (sy, sx) = grid, stride
    shape = (h // sy, w // sx)
    offset = torch.randint(sy * sx, shape, generator=generator, device=generator.device).cpu()
    row = torch.arange(shape[0])[:, None] * sy + offset // sx
    column = torch.arange(shape[1])[None, :] * sx + offset % sx
    return (row * w + column).flatten().tolist()


def _split(chosen: list[int], num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the chosen tokens, and of the others, ascending. Found here, since to ask the device is to wait."""
    is_chosen = set(chosen)
    others = [i for i in range(num_tokens) if i not in is_chosen]
    return torch.tensor(sorted(chosen), device=device), torch.tensor(others, device=device)


def merge_tokens(x: Tensor, matching: Matching, num_merged: int) -> Tensor:
    """Average the `num_merged` most similar source tokens into their destinations.

    Args:
        x: tokens [B, ..., N, D]; leading dimensions between batch and tokens (heads) share one matching.
        matching: from `match_tokens`.
        num_merged: r; a number above that of the sources merges all of them.

    Returns:
        [B, ..., N - r, D]: the sources that stay, most similar first, then all destinations in grid order.
    """
    r = min(max(num_merged, 0), matching.max_merged)
    dst = x[..., matching.destinations, :]
    merged_src = _take(x, matching.sources[:, :r])
    kept_src = _take(x, matching.sources[:, r:])
    index = _spread(matching.targets[:, :r], merged_src)
    dst = dst.scatter_reduce(-2, index, merged_src, reduce="mean", include_self=True)
    return torch.cat([kept_src, dst], dim=-2)


def unmerge_tokens(y: Tensor, matching: Matching, num_merged: int) -> Tensor:
    """Copy every merged token's value back to all tokens that were merged into it.

    Args:
        y: merged tokens [B, ..., N - r, D], in the order of `merge_tokens`.
        matching, num_merged: those given to `merge_tokens`.

    Returns:
        [B, ..., N, D] in grid order.
    """
    slot = merged_slots(matching, num_merged)  # [B, N]
    return _take(y, slot)


def merged_slots(matching: Matching, num_merged: int) -> Tensor:
    """For every token of the grid, the index of the merged token that contains it [B, N]."""
    r = min(max(num_merged, 0), matching.max_merged)
    batch, num_sources = matching.sources.shape
    num_kept = num_sources - r
    device = matching.sources.device
    slot = torch.empty(batch, num_sources + len(matching.destinations), dtype=torch.long, device=device)
    slot[:, matching.destinations] = num_kept + torch.arange(len(matching.destinations), device=device)
    slot.scatter_(1, matching.sources[:, :r], num_kept + matching.targets[:, :r])
    slot.scatter_(1, matching.sources[:, r:], torch.arange(num_kept, device=device).expand(batch, -1))
    return slot


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, ..., N, D], index [B, K] -> [B, ..., K, D]."""
    shape = (*x.shape[:-2], index.shape[1], x.shape[-1])
    middle = (1,) * (x.ndim - 3)
    return x.gather(-2, index.view(index.shape[0], *middle, -1, 1).expand(shape))


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """index [B, K] -> the shape of `like` [B, ..., K, D]."""
    middle = (1,) * (like.ndim - 3)
    return index.view(index.shape[0], *middle, -1, 1).expand_as(like)
