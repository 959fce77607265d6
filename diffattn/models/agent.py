"""Agent attention in a layer of the backbone (Han et al., "Agent Attention", ECCV 2024, arXiv 2312.08874).

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import agent_attention, pool_tokens
from diffattn.models.attention_layer import AttentionLayer, AttentionOptions


class PooledAgentAttention(AttentionLayer):
    """Agent attention with pooled queries, exact if there are at least half as many agents as tokens.

    It has the weights of `SoftmaxAttention`, so a softmax checkpoint runs with it untrained.
    """

    is_official = True  # shared with the softmax layer
    learns = False

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
