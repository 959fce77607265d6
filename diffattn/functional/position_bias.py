"""Position biases of mediator attention (arXiv 2408.05710), for any grid and any number of mediators.

A bias is the sum of a 7×7 window and one vector per axis, all learned:

    B₁ = resize(an → h×w) + ah + aw     of mediators looking at tokens
    B₂ = resize(na → h×w)ᵀ + ha + wa    of tokens looking at mediators

Shapes: H heads, N = h·w tokens in row-major order on a grid (h, w), n = m·m mediators in row-major order.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffattn.functional.precision import at_least_fp32, no_autocast

WINDOW = 7
"""Side of the windows `an` and `na`."""


def gather_bias(an: Tensor, ah: Tensor, aw: Tensor, grid: tuple[int, int]) -> Tensor:
    """B₁, added to the logits of mediators over tokens.

    Args:
        an: windows [H, n, 7, 7], resized to the grid (bilinear, align_corners=False).
        ah: per row [1, H, n, h', 1]; another h' than the grid's h is resized (linear, align_corners=True).
        aw: per column [1, H, n, 1, w'], likewise.
        grid: (h, w) of the tokens.

    Returns:
        [H, n, N], in fp32 at least.
    """
    h, w = grid
    axes = resize_axis(ah, 3, h) + resize_axis(aw, 4, w)  # [1, H, n, h, w]
    with no_autocast(an.device.type):
        rows, columns = (_resizing(size, an) for size in grid)
        window = rows @ at_least_fp32(an) @ columns.mT  # [H, n, h, w]
    return (axes[0] + window).flatten(2)


def spread_bias(na: Tensor, ha: Tensor, wa: Tensor, grid: tuple[int, int]) -> Tensor:
    """B₂, added to the logits of tokens over mediators.

    Args:
        na: windows [H, n, 7, 7], resized as in `gather_bias`.
        ha: per row [1, H, h', 1, n], resized likewise.
        wa: per column [1, H, 1, w', n], likewise.
        grid: (h, w) of the tokens.

    Returns:
        [H, N, n], in fp32 at least.
    """
    h, w = grid
    axes = resize_axis(ha, 2, h) + resize_axis(wa, 3, w)  # [1, H, h, w, n]
    with no_autocast(na.device.type):
        rows, columns = (_resizing(size, na) for size in grid)
        wide = columns @ at_least_fp32(na).permute(0, 2, 3, 1)  # [H, 7, w, n]
        window = (rows @ wide.flatten(2)).unflatten(2, (w, -1))  # [H, h, w, n]
    return (axes[0] + window).flatten(1, 2)


def resize_axis(bias: Tensor, dim: int, size: int) -> Tensor:
    """Resize one axis linearly, first and last entries staying where they are (align_corners=True).

    Args:
        bias: any shape.
        dim: the axis, 0 or more.
        size: its new length, 1 or more.
    """
    bias = at_least_fp32(bias)
    if bias.shape[dim] == size:
        return bias
    moved = bias.movedim(dim, -1)
    resized = interpolate(moved.reshape(1, -1, moved.shape[-1]), size=size, mode="linear", align_corners=True)
    return resized.reshape(*moved.shape[:-1], size).movedim(-1, dim)


def resize_mediators(bias: Tensor, dim: int, num_mediators: int) -> Tensor:
    """Resize the axis of the mediators as an m×m image: bilinear between the centres of their cells.

    Args:
        bias: any shape, with m·m entries along `dim`.
        dim: the axis, 0 or more.
        num_mediators: its new length, a perfect square.
    """
    bias = at_least_fp32(bias)
    if bias.shape[dim] == num_mediators:
        return bias
    side, new_side = isqrt(bias.shape[dim]), isqrt(num_mediators)
    moved = bias.movedim(dim, -1)
    image = moved.reshape(1, -1, side, side)
    resized = interpolate(image, size=(new_side, new_side), mode="bilinear", align_corners=False)
    return resized.reshape(*moved.shape[:-1], num_mediators).movedim(-1, dim)


def _resizing(size: int, like: Tensor) -> Tensor:
    """The matrix [size, 7] that resizes one side of a window linearly (align_corners=False).

    Two products with it are the bilinear resizing of a window, several times faster on a CPU than `interpolate`, and
    with gradients that are the same every time on a GPU.
    """
    unit = at_least_fp32(torch.eye(WINDOW, dtype=like.dtype, device=like.device))
    return interpolate(unit.unsqueeze(0), size=size, mode="linear", align_corners=False)[0].mT
