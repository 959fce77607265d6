"""Mamba-like linear attention (Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024,
arXiv 2405.16605, sec. 4.3).

Shapes: B batch, N = h·w tokens in row-major order on a grid (h, w), H heads, D channels per head, C = H·D channels.
"""

import torch
from torch import Tensor
from torch.nn.functional import elu

from diffattn.functional.checks import check_grid, check_heads, check_same_shape
from diffattn.functional.precision import at_least_fp32, no_autocast

FLOOR = 1e-6
"""Added to the normaliser."""

ROTARY_BASE = 10000.0


def mamba_like_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int], num_heads: int) -> Tensor:
    """Linear attention with positions encoded by rotated queries and keys instead of Mamba's decay.

        O = R(Q') (R(K')ᵀ V / N) / (Q'·k̄' + ε)     Q' = ELU(Q) + 1, K' likewise, k̄' its mean, ε = 1e-6, head by head

    The rotation R is only in the numerator. It acts on all C channels before they are split into heads, pair by pair:
    the first half of the channels turns by the row, the second by the column, see `rotate`.

    The cost is O(N·C·D) instead of O(N²·C). Features, sums and the division are computed in fp32 at least, whatever
    the dtype and autocast, and nothing is complex-valued, so that every backend supports it.

    Args:
        q, k: queries and keys [B, N, C], before ELU + 1.
        v: values [B, N, C].
        grid: (h, w) with h·w = N, of any aspect ratio.
        num_heads: H, which divides C.

    Returns:
        Output [B, N, C], in the dtype of `v`.

    Raises:
        ValueError: the grid does not match the tokens, C is not a multiple of the heads and of 4, or shapes differ.
    """
    check_same_shape("B, N, C", q=q, k=k, v=v)
    check_grid(grid, q.shape[1])
    check_heads(q.shape[-1], num_heads)
    with no_autocast(v.device.type):
        q, k = (elu(at_least_fp32(x)) + 1 for x in (q, k))
        turned_q, turned_k = (_heads(rotate(x, grid), num_heads) for x in (q, k))
        gathered = turned_k.mT @ _heads(at_least_fp32(v), num_heads) / q.shape[1]  # [B, H, D, D]
        mean_k = _heads(k.mean(dim=1, keepdim=True), num_heads)  # [B, H, 1, D]
        normaliser = (_heads(q, num_heads) * mean_k).sum(dim=-1, keepdim=True) + FLOOR  # [B, H, N, 1]
        return (turned_q @ gathered / normaliser).transpose(1, 2).flatten(2).to(v.dtype)


def rotate(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rotary embedding of rows and columns (Su et al., "RoFormer", arXiv 2104.09864, eq. 34), real-valued.

        (x_2i, x_2i+1) -> (x_2i cos a - x_2i+1 sin a, x_2i sin a + x_2i+1 cos a)

    a = row·θ_i for the pairs i of the first half of the channels, column·θ_i-C/4 for those of the second;
    θ_i = 10000^(-i/(C/4)), with positions that count tokens from 0, at every resolution.

    Args:
        x: tokens [B, N, C], row-major on `grid`, in fp32 at least.
        grid: (h, w) with h·w = N.

    Raises:
        ValueError: C is not a multiple of 4.
    """
    channels = x.shape[-1]
    if channels % 4:
        raise ValueError(f"a rotary embedding of rows and columns needs a multiple of 4 channels, got {channels}")
    h, w = grid
    pairs = x.unflatten(1, grid).unflatten(-1, (2, channels // 4, 2))  # [B, h, w, 2, C/4, 2]
    rows, columns = (_angles(size, channels, x) for size in grid)
    angle = torch.stack((rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)), dim=2)  # [h, w, 2, C/4]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(3).flatten(1, 2)


def _angles(size: int, channels: int, like: Tensor) -> Tensor:
    """Angles of positions 0 to size - 1 along one axis [size, C/4]."""
    number = channels // 4
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    theta = ROTARY_BASE ** -(torch.arange(number, dtype=dtype, device=like.device) / number)
    return torch.outer(torch.arange(size, dtype=dtype, device=like.device), theta)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, H, N, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
