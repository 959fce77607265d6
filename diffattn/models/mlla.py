"""The mixer of a Mamba-like block (Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS
2024, arXiv 2405.16605).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffattn.functional import mamba_like_linear_attention
from diffattn.models.attention_layer import OPEN, Attention, AttentionOptions, TokenConv, Weights, check_all_on_grid


class MambaLikeAttention(nn.Module):
    """Linear attention between rotated queries and keys, with the input itself as the values:

    O = R(Q') (R(K')ᵀ x / N) / (Q'·k̄' + ε) + DWConv3×3(x)
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.lepe = TokenConv(dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        return mamba_like_linear_attention(q, k, x, grid=grid, num_heads=self.num_heads) + self.lepe(x, grid)


class MambaLikeMixer(Attention):
    """The part of a Mamba-like block between its norm and its residual connection.

        g = SiLU(x W_a),  u = SiLU(DWConv3×3(x W_i)),  O = (Attention(u) ⊙ g) W_o

    Such a block adds a depth-wise convolution of its tokens before this and before its MLP; in the backbone, norm and
    output are modulated by the condition as in every other block.

    Raises:
        ValueError: `qk_norm`, which these layers do not have; channels that are not a multiple of 4.
    """

    convolves_before = ("attention", "mlp")

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__()
        if options.qk_norm:
            raise ValueError("qk_norm=True is for layers with a softmax or a product; mlla layers allow only False")
        if dim % 4:
            raise ValueError(f"mlla layers rotate rows and columns, which needs a multiple of 4 channels, got {dim}")
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = TokenConv(dim)
        self.attn = MambaLikeAttention(dim, options.num_heads)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        check_all_on_grid("mlla", x, grid)
        mixed = self.attn(silu(self.dwc(self.in_proj(x), grid)), grid)
        return self.out_proj(mixed * silu(self.act_proj(x)))

    def softmax_weights(self) -> dict[str, Tensor]:
        """Return None, since the values of other layers do not come from a gate and a convolution."""
        return {}

    def take_softmax(self, weights: Weights) -> dict[str, Tensor]:
        """Queries, keys, values and output are the softmax layer's; gate and convolutions start neutral."""
        with torch.no_grad():
            for parameter in (*self.dwc.parameters(), *self.attn.lepe.parameters(), *self.act_proj.parameters()):
                parameter.zero_()
            self.dwc.weight[:, :, 1, 1] = 1
            self.act_proj.bias.fill_(OPEN)
        taken = {}
        for part in ("weight", "bias"):
            if f"qkv.{part}" in weights:
                q, k, v = weights[f"qkv.{part}"].chunk(3)
                taken |= {f"attn.qk.{part}": torch.cat((q, k)), f"in_proj.{part}": v}
            if f"proj.{part}" in weights:
                taken[f"out_proj.{part}"] = weights[f"proj.{part}"]
        return taken
