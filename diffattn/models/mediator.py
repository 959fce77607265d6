"""Mediator attention in a layer of the backbone (Pu et al., "Efficient Diffusion Transformer with Step-wise Dynamic
Attention Mediators", ECCV 2024, arXiv 2408.05710).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), n mediators, D channels per head,
C = H·D channels.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from diffattn.functional import (
    gather_bias,
    mediator_attention,
    pool_mediators,
    resize_axis,
    resize_mediators,
    spread_bias,
)
from diffattn.functional.position_bias import WINDOW
from diffattn.models.attention_layer import Attention, AttentionLayer, AttentionOptions, Weights
from diffattn.models.kept import Kept

MEDIATOR_AXIS = {"an_bias": 1, "na_bias": 1, "ah_bias": 2, "aw_bias": 2, "ha_bias": 4, "wa_bias": 4}
"""The position biases as published checkpoints name them -> the axis of the mediators."""

GRID_AXIS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""The position biases that follow the grid -> the axis of its rows or columns."""


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

    is_official = True

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__(dim, options)
        self.mediators = options.mediators
        self.biases = nn.ModuleDict({str(n): PositionBias(self.num_heads, n, options.grid) for n in self.mediators})
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self._kept = Kept()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        gather, spread = self._on_grid(num_mediators, grid, q.dtype)
        mediators = pool_mediators(q, grid, num_mediators)  # [B, H, n, D]
        # The convolved values come first: the sum inherits their memory layout, which the projection needs.
        return self._convolve(v, grid) + mediator_attention(q, k, v, mediators, gather, spread)

    def _convolve(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Depth-wise 3×3 convolution of the values [B, H, N, D] laid out as an image of C channels."""
        image = v.transpose(1, 2).flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
        tokens = self.dwc(image).permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _on_grid(self, num_mediators: int, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """B₁ [H, n, N] and B₂ [H, N, n], in the dtype of the logits where they are kept between calls."""
        weights = [weight for n in self._numbers_around(num_mediators) for weight in self._bias(n).parameters()]

        def compute() -> tuple[Tensor, ...]:
            bias = self.biases_at(num_mediators)
            gather = gather_bias(bias["an_bias"], bias["ah_bias"], bias["aw_bias"], grid)
            spread = spread_bias(bias["na_bias"], bias["ha_bias"], bias["wa_bias"], grid)
            return gather.to(dtype), spread.to(dtype)

        return self._kept.get((num_mediators, grid, dtype), weights, compute)

    def _numbers_around(self, num_mediators: int) -> tuple[int, ...]:
        """The number itself if it was learned, else those below and above it."""
        if num_mediators in self.mediators:
            return (num_mediators,)
        below = max(n for n in self.mediators if n < num_mediators)
        return below, min(n for n in self.mediators if n > num_mediators)

    def biases_at(self, num_mediators: int) -> dict[str, Tensor]:
        """The position biases of a number of mediators, by their published names, for the grid of the sample size.

        Args:
            num_mediators: a perfect square from the smallest to the largest of the set.
        """
        around = self._numbers_around(num_mediators)
        if len(around) == 1:
            return self._bias(num_mediators).tensors()
        below, above = around
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

    def take(self, other: Attention) -> dict[str, Tensor]:
        """Biases are resized to the grid, and to the number of mediators where the other layer's differs."""
        if not isinstance(other, MediatorAttention):
            return super().take(other)
        kept = {name: weight for name, weight in other.state_dict().items() if not name.startswith("biases.")}
        return kept | self._fitted_biases(other)

    def take_softmax(self, weights: Weights) -> dict[str, Tensor]:
        """Biases keep their small random values, the convolution starts at zero: plain attention through mediators."""
        nn.init.zeros_(self.dwc.weight)
        nn.init.zeros_(self.dwc.bias)  # type: ignore[arg-type]
        return dict(weights)

    def _fitted_biases(self, other: "MediatorAttention") -> dict[str, Tensor]:
        """The other layer's biases at our numbers of mediators and on our grid, from the nearest of its numbers."""
        fitted = {}
        for n in self.mediators:
            inside = min(other.mediators) <= n <= max(other.mediators)
            nearest = n if inside else min(other.mediators, key=lambda m: abs(m - n))
            biases = other.biases_at(nearest)
            for name, like in self.biases_at(n).items():
                bias = resize_mediators(biases[name], MEDIATOR_AXIS[name], n)
                if name in GRID_AXIS:
                    bias = resize_axis(bias, GRID_AXIS[name], like.shape[GRID_AXIS[name]])
                fitted[f"biases.{n}.{name}"] = bias.detach().to(like.dtype)
        return fitted

    def official_weights(self, num_mediators: int) -> dict[str, Tensor]:
        """The official layout has the biases of one number of mediators, stored beside the other weights."""
        kept = {name: weight for name, weight in self.state_dict().items() if not name.startswith("biases.")}
        return kept | self.biases_at(num_mediators)
