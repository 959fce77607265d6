"""Agent attention (Han et al., "Agent Attention", ECCV 2024, arXiv 2312.08874, eq. 3-5).

Shapes: B batch, H heads, N query tokens, M key tokens, n agent tokens, D channels per head.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale_exponent: float = 0.3,
    shortcut: float = 0.075,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention through a few agent tokens, which aggregate keys and values and broadcast the result to every query.

        V_A = softmax(s·A Kᵀ) V             aggregate, s = D^(-1/2)
        O   = softmax(s^κ·Q Aᵀ) V_A + c·V   broadcast and shortcut

    The cost is O((N + M)·n·D) instead of O(N·M·D). Averaged agents have a small norm; κ < 1 enlarges the
    logits of the broadcast (4.3 times at D = 64, κ = 0.3) to sharpen them again.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        v: values [B, H, M, D].
        agents: agent tokens [B, H, n, D], usually pooled queries.
        scale_exponent: κ, exponent on the softmax scale of the broadcast; 1 is the plain scale.
        shortcut: c, share of each token's own value added to its output; anything but 0 needs N = M.
        key_mask: additive mask over the keys, broadcastable to [B, H, n, M] (the same for every query).

    Returns:
        Output [B, H, N, D], in the dtype of `v`.

    Raises:
        ValueError: a shortcut between different numbers of queries and values.
    """
    num_queries, head_dim = q.shape[-2:]
    if shortcut and num_queries != v.shape[-2]:
        raise ValueError(
            f"shortcut={shortcut} adds each token's value to its output and needs as many queries as values, "
            f"got {num_queries} and {v.shape[-2]}; pass shortcut=0"
        )
    agent_v = scaled_dot_product_attention(agents, k, v, attn_mask=key_mask)  # [B, H, n, D]
    out = scaled_dot_product_attention(q, agents, agent_v, scale=head_dim ** (-0.5 * scale_exponent))
    return out.add(v, alpha=shortcut) if shortcut else out
