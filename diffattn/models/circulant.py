"""Circulant attention in a layer of the backbone (Han et al., "Vision Transformers are Circulant Attention Learners",
arXiv 2512.21542).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

from torch import Tensor, nn

from diffattn.functional import circulant_attention
from diffattn.models.attention_layer import (
    OPEN,
    AttentionLayer,
    AttentionOptions,
    Weights,
    check_all_on_grid,
    join,
    split,
)


class CirculantAttention(AttentionLayer):
    """One softmax over shifts per channel, and a gate.

        y = (Circulant(Q, K, V) ⊙ SiLU(x W_t)) W_o

    Projections of queries, keys and values have no bias. Its block adds a depth-wise convolution of the tokens first.
    Logits grow with the square root of the number of tokens: on another grid than that of the sample size, queries are
    scaled by √(N_train / N). Tokens off the grid are refused.
    """

    convolves_before = ("attention",)
    qkv_bias = False

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__(dim, options)
        self.tokens = options.grid[0] * options.grid[1]
        self.gate = nn.Sequential(nn.Linear(dim, dim), nn.SiLU())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        q, k, v = join(q), join(k), join(v)  # [B, N, C]: there are no heads
        check_all_on_grid("circulant", q, grid)
        if (now := q.shape[1]) != self.tokens:
            q = q * (self.tokens / now) ** 0.5
        return split(circulant_attention(q, k, v, grid=grid), self.num_heads)

    def finish(self, out: Tensor, x: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        return out * self.gate(x)

    def take_softmax(self, weights: Weights) -> dict[str, Tensor]:
        """The biases of queries, keys and values are dropped; the gate starts open."""
        nn.init.zeros_(self.gate[0].weight)  # type: ignore[arg-type]
        nn.init.constant_(self.gate[0].bias, OPEN)  # type: ignore[arg-type]
        return {name: weight for name, weight in weights.items() if name != "qkv.bias"}
