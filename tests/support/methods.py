"""Calls of a method's attention function, without a model."""

from typing import Any

import torch
from torch import Tensor

from diffattn.methods.base import LayerCall, LayerSpec, TokenLayout
from support.tensors import random

LAYER = LayerSpec("layer", level=0, num_heads=2, head_dim=8)


def qkv(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries, keys and values of `LAYER`."""
    return tuple(random(batch, 2, tokens, 8, seed=s, dtype=dtype) for s in range(3))


def layer_call(layout: TokenLayout, **more: Any) -> LayerCall:
    return LayerCall(x=None, grid=layout.grid, layout=layout, **more)
