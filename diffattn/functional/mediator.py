"""Mediator attention (Pu et al., "Efficient Diffusion Transformer with Step-wise Dynamic Attention Mediators",
ECCV 2024, arXiv 2408.05710).

Shapes: B batch, H heads, N = h·w image tokens in row-major order on a grid (h, w), n mediator tokens, D channels
per head.
"""

from math import isqrt

from torch import Tensor

from diffattn.functional.checks import check_grid
from diffattn.functional.sdpa import biased_attention
from diffattn.functional.tokens import pooled_on_grid


def mediator_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mediators: Tensor,
    gather_bias: Tensor | None = None,
    spread_bias: Tensor | None = None,
) -> Tensor:
    """Attention through a few mediator tokens, which gather keys and values and spread the result to every query.

        V_M = softmax(s·M Kᵀ + B₁) V     gather, s = D^(-1/2)
        O   = softmax(s·Q Mᵀ + B₂) V_M   spread

    The cost is O(N·n·D) instead of O(N²·D). The depth-wise convolution that the paper adds to O is left to the layer.
    Logits and softmax are fp32 in half precision too, see `sdpa.biased_attention`.

    Args:
        q, k, v: queries, keys and values [B, H, N, D].
        mediators: M [B, H, n, D], from `pool_mediators`.
        gather_bias: B₁ [H, n, N], from `position_bias.gather_bias`.
        spread_bias: B₂ [H, N, n], from `position_bias.spread_bias`.

    Returns:
        Output [B, H, N, D], in the dtype of `v`.

    Raises:
        ValueError: a bias of another shape.
    """
    heads, tokens, n = q.shape[1], q.shape[2], mediators.shape[2]
    _check_bias(gather_bias, "gather_bias", (heads, n, k.shape[2]))
    _check_bias(spread_bias, "spread_bias", (heads, tokens, n))
    mediator_v = biased_attention(mediators, k, v, gather_bias)  # [B, H, n, D]
    return biased_attention(q, mediators, mediator_v, spread_bias)


def _check_bias(bias: Tensor | None, name: str, shape: tuple[int, int, int]) -> None:
    if bias is not None and tuple(bias.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(bias.shape)}")


def pool_mediators(q: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
    """M = adaptive average pooling of the queries over their grid to √n × √n, whatever the grid's aspect ratio.

    Args:
        q: queries [B, H, N, D], row-major on `grid`.
        grid: (h, w) with h·w = N.
        num_mediators: n, a perfect square; √n at most the shorter side of the grid.

    Returns:
        Mediators [B, H, n, D], row-major.

    Raises:
        ValueError: the grid does not match the tokens, or has no room for so many mediators.
    """
    side = mediator_side(num_mediators, grid)
    check_grid(grid, q.shape[2])
    return pooled_on_grid(q, grid, (side, side))


def mediator_side(num_mediators: int, grid: tuple[int, int] | None = None) -> int:
    """√n, for a number of mediators that is a perfect square and, if a grid is given, fits on it.

    Raises:
        ValueError: it is not a perfect square, or does not fit; the message says what is allowed.
    """
    if not isinstance(num_mediators, int) or isinstance(num_mediators, bool) or num_mediators < 1:
        raise ValueError(f"num_mediators must be a perfect square (1, 4, 9, 16, …), got {num_mediators!r}")
    side = isqrt(num_mediators)
    if side**2 != num_mediators:
        raise ValueError(
            f"num_mediators must be a perfect square, got {num_mediators}; "
            f"the nearest are {side**2} and {(side + 1) ** 2}"
        )
    if grid is not None and side > min(grid):
        raise ValueError(
            f"num_mediators={num_mediators} is {side}x{side} and larger than the grid of {grid[0]}x{grid[1]} tokens; "
            f"allowed there: up to {min(grid) ** 2}"
        )
    return side
