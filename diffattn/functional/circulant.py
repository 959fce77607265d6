"""Circulant attention (Han et al., "Vision Transformers are Circulant Attention Learners", arXiv 2512.21542).

Shapes: B batch, N = h·w tokens in row-major order on a grid (h, w), C channels, τ shifts on the grid.
"""

import torch
from torch import Tensor

from diffattn.functional.checks import check_grid, check_same_shape
from diffattn.functional.precision import at_least_fp32, no_autocast


def circulant_attention(q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Softmax attention with the same weights for every query, shifted to its position: one softmax per channel.

        a_c[τ] = N^(-1/2) Σ_s q_c[s] k_c[s + τ]     the logit of a shift, s + τ on a torus of h by w tokens
        O_c[s] = Σ_τ softmax_τ(a_c)[τ] v_c[s + τ]

    Both sums are products of Fourier transforms, so the cost is O(N·log N·C) instead of O(N²·C). The transforms and the
    softmax are computed in fp32 at least, whatever the dtype and autocast. The means of the keys are subtracted
    first: they add a constant to all logits of a channel, which would drown the differences.

    Logits grow with √N. If a model runs on a different grid than in training, its module scales the queries by
    √(N_train / N); this function does not.

    Args:
        q, k, v: queries, keys and values [B, N, C]; there are no heads.
        grid: (h, w) with h·w = N, of any aspect ratio. Tokens outside the grid are not supported.

    Returns:
        Output [B, N, C], in the dtype of `v`.

    Raises:
        ValueError: the grid does not match the tokens, or shapes differ.
    """
    check_same_shape("B, N, C", q=q, k=k, v=v)
    check_grid(grid, q.shape[1])
    with no_autocast(v.device.type):
        wide_q, wide_k, wide_v = (_image(at_least_fp32(x), grid) for x in (q, k, v))
        wide_q = wide_q * q.shape[1] ** -0.5
        wide_k = wide_k - wide_k.mean(dim=(-2, -1), keepdim=True)
        weights = correlate(wide_q, wide_k).flatten(-2).softmax(dim=-1).unflatten(-1, grid)
        return correlate(weights, wide_v).flatten(-2).mT.to(v.dtype)


def correlate(x: Tensor, y: Tensor) -> Tensor:
    """Σ_s x[s] y[s + τ] at every τ of a torus [B, C, h, w], for fp32 and fp64.

    The inverse gets the size, since it cannot distinguish an odd number of columns from the even one below.
    """
    spectrum = torch.fft.rfft2(x).conj() * torch.fft.rfft2(y)  # [B, C, h, w // 2 + 1]
    return torch.fft.irfft2(spectrum, s=x.shape[-2:])


def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] -> [B, C, h, w], channel by channel in memory"""
    return x.mT.contiguous().unflatten(-1, grid)
