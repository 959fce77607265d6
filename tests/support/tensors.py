"""Reproducible random tensors, layouts of tokens, and relative errors."""

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, H, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, C]"""
    return x.transpose(1, 2).flatten(2)


def as_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] -> [B, C, h, w]"""
    return x.mT.unflatten(-1, grid)


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, C]"""
    return x.flatten(2).mT


def relative_error(found: Tensor, true: Tensor) -> float:
    """‖found - true‖ / ‖true‖"""
    return ((found.double() - true.double()).norm() / true.double().norm()).item()
