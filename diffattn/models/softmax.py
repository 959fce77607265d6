"""Exact attention in a layer of the backbone.

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.models.attention_layer import AttentionLayer


class SoftmaxAttention(AttentionLayer):
    """Exact attention."""

    is_official = True
    learns = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        return scaled_dot_product_attention(q, k, v)
