"""Softmax attention with a bias, in whichever formulation is fastest on the device.

Shapes: B batch, H heads, N queries, M keys, D channels per head.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(s·Q Kᵀ + B) V with s = D^(-1/2), for few queries or few keys.

    This is `scaled_dot_product_attention` except in one case. No fused kernel computes the gradient of a mask: on the
    CPU a learned bias falls back to a general path with many passes over the logits. In fp32 and fp64, two plain
    products and a softmax need fewer. Logits and softmax are fp32 in half precision either way.

    Args:
        q: queries [B, H, N, D].
        k, v: keys and values [B, H, M, D].
        bias: B [H, N, M], in any floating dtype.

    Returns:
        [B, H, N, D], in the dtype of `v`.
    """
    mask = None if bias is None else bias.to(q.dtype)
    if mask is None or not _learns_on_cpu(q, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.unsqueeze(0))
    scale = q.shape[-1] ** -0.5
    few_queries = q.shape[2] <= k.shape[2]
    q, k = (q * scale, k) if few_queries else (q, k * scale)  # the smaller of the two
    return (q @ k.mT).add_(mask).softmax(-1) @ v


def _learns_on_cpu(q: Tensor, bias: Tensor) -> bool:
    """Whether the bias needs a gradient, and plain products on the CPU are precise enough."""
    learns = bias.requires_grad and torch.is_grad_enabled()
    precise = q.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return learns and precise and q.device.type == "cpu"
