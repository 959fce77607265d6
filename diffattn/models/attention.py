"""Attention layers of the backbone: softmax, agents, mediators. A new one is a class here and a line in `ATTENTION`.

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), n mediators, D channels per head,
C = H·D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import (
    agent_attention,
    gather_bias,
    mediator_attention,
    pool_mediators,
    pool_tokens,
    resize_mediators,
    spread_bias,
)
from diffattn.functional.position_bias import WINDOW

MEDIATOR_AXIS = {"an_bias": 1, "na_bias": 1, "ah_bias": 2, "aw_bias": 2, "ha_bias": 4, "wa_bias": 4}
"""The position biases as published checkpoints name them -> the axis of the mediators."""


@dataclass(frozen=True)
class AttentionOptions:
    """What the layers of one model have in common."""

    num_heads: int
    grid: tuple[int, int]  # of the sample size; other grids resize the position biases
    qk_norm: bool = False
    mediators: tuple[int, ...] = ()  # the numbers of mediators with biases of their own, ascending
    num_agents: int = 64
    agent_scale_exponent: float = 0.3
    agent_shortcut: float = 0.075


class HeadNorm(nn.RMSNorm):
    """RMS norm in the dtype of its weight, which stays fp32 under autocast; the input's dtype comes back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerProcessor(Protocol):
    """What can stand in the place of a layer's `attend`: a plain object, which is not saved with the model.

    It gets the layer, its input x [B, N, C], the projected and normed q, k, v [B, H, N, D], and what `attend` gets
    besides; it returns [B, H, N, D].
    """

    def __call__(
        self,
        layer: "AttentionLayer",
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        num_mediators: int,
    ) -> Tensor: ...


class AttentionLayer(nn.Module, ABC):
    """Projections around what a subclass does with q, k and v."""

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__()
        self.processor: LayerProcessor | None = None
        self.num_heads = options.num_heads
        head_dim = dim // options.num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadNorm(head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        """x [B, N, C] -> [B, N, C]; `num_mediators` is for the layers that have any."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.processor is None:
            out = self.attend(q, k, v, grid, num_mediators)
        else:
            out = self.processor(self, x, q, k, v, grid, num_mediators)
        return self.proj(out.transpose(1, 2).flatten(2))

    def set_processor(self, processor: LayerProcessor | None) -> None:
        """Put a processor in the place of `attend`; None takes it out again."""
        self.processor = processor

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]"""


class SoftmaxAttention(AttentionLayer):
    """Exact attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class PooledAgentAttention(AttentionLayer):
    """Agent attention with pooled queries, exact where agents are no fewer than half the tokens.

    It has the weights of `SoftmaxAttention`, so a softmax checkpoint runs with it untrained.
    """

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__(dim, options)
        self.num_agents = options.num_agents
        self.scale_exponent = options.agent_scale_exponent
        self.shortcut = options.agent_shortcut

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        if 2 * self.num_agents >= q.shape[2]:
            return scaled_dot_product_attention(q, k, v)
        agents = pool_tokens(q, grid, self.num_agents)  # [B, H, about num_agents, D]
        return agent_attention(q, k, v, agents, scale_exponent=self.scale_exponent, shortcut=self.shortcut)


class PositionBias(nn.Module):
    """Learned position biases of one number of mediators on one grid."""

    def __init__(self, num_heads: int, num_mediators: int, grid: tuple[int, int]) -> None:
        super().__init__()
        h, w = grid
        heads, n = num_heads, num_mediators
        self.an_bias = nn.Parameter(torch.empty(heads, n, WINDOW, WINDOW))
        self.na_bias = nn.Parameter(torch.empty(heads, n, WINDOW, WINDOW))
        self.ah_bias = nn.Parameter(torch.empty(1, heads, n, h, 1))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, n, 1, w))
        self.ha_bias = nn.Parameter(torch.empty(1, heads, h, 1, n))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, w, n))
        for bias in self.parameters():
            nn.init.trunc_normal_(bias, std=0.02)

    def tensors(self) -> dict[str, Tensor]:
        """The biases by their published names."""
        return {name: getattr(self, name) for name in MEDIATOR_AXIS}


class MediatorAttention(AttentionLayer):
    """Mediator attention with elastic numbers of mediators.

        O = softmax(s·Q Mᵀ + B₂) softmax(s·M Kᵀ + B₁) V + DWConv3×3(V)

    Each number of the configured set has position biases of its own; everything else is shared. A perfect square
    between two of the set blends their biases, in proportion to √n.
    """

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__(dim, options)
        self.mediators = options.mediators
        self.biases = nn.ModuleDict({str(n): PositionBias(self.num_heads, n, options.grid) for n in self.mediators})
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        bias = self.biases_at(num_mediators)
        gather = gather_bias(bias["an_bias"], bias["ah_bias"], bias["aw_bias"], grid)  # [H, n, N]
        spread = spread_bias(bias["na_bias"], bias["ha_bias"], bias["wa_bias"], grid)  # [H, N, n]
        mediators = pool_mediators(q, grid, num_mediators)  # [B, H, n, D]
        # The convolved values come first: their sum has their layout in memory, the one that the projection takes.
        return self._convolve(v, grid) + mediator_attention(q, k, v, mediators, gather, spread)

    def _convolve(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Depth-wise 3×3 convolution of the values [B, H, N, D] laid out as an image of C channels."""
        image = v.transpose(1, 2).flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
        tokens = self.dwc(image).permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def biases_at(self, num_mediators: int) -> dict[str, Tensor]:
        """The position biases of a number of mediators, by their published names, for the grid of the sample size.

        Args:
            num_mediators: a perfect square from the smallest to the largest of the set.
        """
        if num_mediators in self.mediators:
            return self._bias(num_mediators).tensors()
        below = max(n for n in self.mediators if n < num_mediators)
        above = min(n for n in self.mediators if n > num_mediators)
        share = (isqrt(num_mediators) - isqrt(below)) / (isqrt(above) - isqrt(below))
        low, high = self._bias(below).tensors(), self._bias(above).tensors()
        return {
            name: torch.lerp(
                resize_mediators(low[name], axis, num_mediators),
                resize_mediators(high[name], axis, num_mediators),
                share,
            )
            for name, axis in MEDIATOR_AXIS.items()
        }

    def _bias(self, num_mediators: int) -> PositionBias:
        bias = self.biases[str(num_mediators)]
        assert isinstance(bias, PositionBias)
        return bias


ATTENTION: Mapping[str, type[AttentionLayer]] = {
    "softmax": SoftmaxAttention,
    "agent": PooledAgentAttention,
    "mediator": MediatorAttention,
}
"""What a layer's attention is called in the configuration."""
