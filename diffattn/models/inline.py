"""InLine attention in a layer of the backbone (Han et al., "Bridging the Divide: Reconsidering Softmax and Linear
Attention", NeurIPS 2024, arXiv 2412.06590).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from diffattn.functional import inline_attention
from diffattn.models.attention_layer import AttentionLayer, AttentionOptions, join, on_grid


class InLineAttention(AttentionLayer):
    """The linear expansion of a softmax, and a 3×3 convolution of the values with input-dependent weights.

        O = v̄ + s·Q Cov(K, V) + DWConv3×3(V; r),  r = MLP(mean of x over the tokens)

    The MLP has a group per head, and its last layer starts at zero: a new layer is the core alone. Tokens off the grid
    come first; they take part in the core and in the mean, and the convolution skips them.
    """

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__(dim, options)
        heads = self.num_heads
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), last := nn.Conv1d(dim, 9 * dim, 1, groups=heads)
        )
        for weight in last.parameters():
            nn.init.zeros_(weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        return inline_attention(q, k, v)

    def finish(self, out: Tensor, x: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        values, apart = on_grid(v, grid)
        kernels = self.residual(x.mean(dim=1, keepdim=True).mT).reshape(-1, 1, 3, 3)  # [B·C, 1, 3, 3]
        image = join(values).mT.reshape(1, -1, *grid)  # [1, B·C, h, w]
        local = conv2d(image, kernels, padding=1, groups=len(kernels))
        local = local.reshape(len(x), -1, grid[0] * grid[1]).mT  # [B, h·w, C]
        return out + (pad(local, (0, 0, apart, 0)) if apart else local)
