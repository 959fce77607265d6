"""Focused linear attention in a layer of the backbone (Han et al., "FLatten Transformer", ICCV 2023, arXiv 2308.00442).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from diffattn.functional import focused_linear_attention, resize_axis
from diffattn.functional.focused_linear import check_power
from diffattn.functional.precision import at_least_fp32
from diffattn.models.attention_layer import Attention, AttentionLayer, AttentionOptions, Weights, join, on_grid, split


class FocusedLinearAttention(AttentionLayer):
    """Focused linear attention of keys with a position encoding, and a depth-wise convolution of the values.

        O = φ(Q) (φ(K + PE)ᵀ V) / (φ(Q)·Σ φ(K + PE)) + DWConv5×5(V)

    The convolution has the weights of one head, shared by all. The encoding is learned on the grid of the sample size
    and resized to others. Tokens off the grid come first; encoding and convolution skip them.

    Args:
        dim, options: as for every layer.
        power: p of the feature map, a finite number of at least 1.
        kernel_size: of the convolution, odd.
    """

    def __init__(self, dim: int, options: AttentionOptions, *, power: float = 3, kernel_size: int = 5) -> None:
        super().__init__(dim, options)
        check_power(power)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of at least 1, got {kernel_size!r}")
        self.power, self.grid = power, options.grid
        head_dim = dim // self.num_heads
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        _, apart = on_grid(k, grid)
        encoding = self.encoding(grid)
        keys = join(k) + (pad(encoding, (0, 0, apart, 0)) if apart else encoding)
        scale = softplus(at_least_fp32(self.scale)).flatten()
        out = focused_linear_attention(join(q), keys, join(v), scale=scale, num_heads=self.num_heads, power=self.power)
        return split(out, self.num_heads)

    def finish(self, out: Tensor, x: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        values, apart = on_grid(v, grid)
        images = values.transpose(2, 3).flatten(0, 1).unflatten(-1, grid)  # [B·H, D, h, w]
        local = join(self.dwc(images).flatten(2).unflatten(0, (len(x), -1)).transpose(2, 3))  # [B, h·w, C]
        return out + (pad(local, (0, 0, apart, 0)) if apart else local)

    def encoding(self, grid: tuple[int, int]) -> Tensor:
        """The position encoding of a grid [1, h·w, C]."""
        if grid == self.grid:
            return self.positional_encoding
        image = self.positional_encoding.unflatten(1, self.grid)  # [1, h, w, C]
        return resize_axis(resize_axis(image, 1, grid[0]), 2, grid[1]).flatten(1, 2)

    def take(self, other: Attention) -> dict[str, Tensor]:
        taken = super().take(other)
        if isinstance(other, FocusedLinearAttention):
            own = self.positional_encoding
            taken["positional_encoding"] = other.encoding(self.grid).detach().to(own.dtype)
        return taken

    def take_softmax(self, weights: Weights) -> dict[str, Tensor]:
        """The convolution starts at zero."""
        nn.init.zeros_(self.dwc.weight)
        nn.init.zeros_(self.dwc.bias)  # type: ignore[arg-type]
        return dict(weights)
