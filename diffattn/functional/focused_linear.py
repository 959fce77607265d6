"""Focused linear attention (Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention",
ICCV 2023, arXiv 2308.00442, eq. 5-7).

Shapes: B batch, N query tokens, M key tokens, H heads, D channels per head, C = H·D channels.
"""

from math import isfinite

import torch
from torch import Tensor

from diffattn.functional.checks import check_heads, check_keys
from diffattn.functional.precision import at_least_fp32, no_autocast

FLOOR = 1e-6
"""Added to every feature and to the normaliser: tokens without a positive channel stay finite."""


def focused_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: Tensor, num_heads: int, power: float = 3
) -> Tensor:
    """Linear attention whose feature map turns tokens towards their largest channels, without changing their norm.

        O = φ(Q) (φ(K)ᵀ V / M) / (φ(Q)·φ̄ + ε)        φ̄ the mean of φ(K) over the keys, ε = 1e-6, head by head
        φ(x) = ‖u‖·u^p / ‖u^p‖, u = (ReLU(x) + ε) / σ   element by element; norms over all C channels

    The cost is O((N + M)·C·D) instead of O(N·M·C). Each token is divided by its largest channel before the power,
    which leaves φ as it is and keeps it finite for every p: without, u^p underflows in fp32 from p = 4 on where all
    channels are negative, and at p = 3 in fp16. Features, sums and the division are computed in fp32 at least,
    whatever the dtype and autocast.

    Args:
        q: queries [B, N, C], before the feature map.
        k: keys [B, M, C], with their position encoding; M may be smaller than N.
        v: values [B, M, C].
        scale: σ [C], positive: the softplus of the learned parameter.
        num_heads: H, which divides C.
        power: p, a finite number of at least 1; 1 leaves the directions unchanged.

    Returns:
        Output [B, N, C], in the dtype of `v`.

    Raises:
        ValueError: `power` out of range, C not divisible by the heads, or shapes that do not fit together.
    """
    check_keys("B, N, C", q, k, v)
    check_heads(q.shape[-1], num_heads)
    check_power(power)
    if scale.shape != q.shape[-1:]:
        raise ValueError(f"scale must have the shape [{q.shape[-1]}], one for each channel, got {list(scale.shape)}")
    with no_autocast(v.device.type):
        sigma = at_least_fp32(scale)
        focused_q, focused_k = (_heads(focus(x, sigma, power), num_heads) for x in (q, k))
        mean_k = focused_k.mean(dim=-2).unsqueeze(-1)  # [B, H, D, 1]
        gathered = focused_k.mT @ _heads(at_least_fp32(v), num_heads) / k.shape[-2]  # [B, H, D, D]
        out = (focused_q @ gathered) / (focused_q @ mean_k + FLOOR)
        return out.transpose(1, 2).flatten(2).to(v.dtype)


def check_power(power: float) -> None:
    """Raise `ValueError` unless p is a finite number of at least 1."""
    if isinstance(power, bool) or not isinstance(power, int | float) or not isfinite(power) or power < 1:
        raise ValueError(f"power must be a finite number of at least 1, got {power!r}")


def focus(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """φ of `focused_linear_attention`: tokens [B, N, C] -> [B, N, C], in fp32 at least."""
    u = (at_least_fp32(x).relu() + FLOOR) / scale
    largest = u.detach().amax(dim=-1, keepdim=True)  # any factor works: neither φ nor its gradient depends on it
    u = u / largest
    focused = u if power == 1 else u**power
    norm, focused_norm = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (u, focused))
    return focused * (largest * norm / focused_norm)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, H, N, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
