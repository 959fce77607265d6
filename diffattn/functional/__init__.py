"""Pure tensor functions. Nothing here depends on diffusers, layers or configuration."""

from diffattn.functional.agent import agent_attention
from diffattn.functional.circulant import circulant_attention
from diffattn.functional.downsampled import downsample_tokens, downsampled_attention
from diffattn.functional.focused_linear import focused_linear_attention
from diffattn.functional.inline import inline_attention
from diffattn.functional.landmark import landmark_attention
from diffattn.functional.mamba_like import mamba_like_linear_attention
from diffattn.functional.mediator import mediator_attention, mediator_side, pool_mediators
from diffattn.functional.position_bias import gather_bias, resize_axis, resize_mediators, spread_bias
from diffattn.functional.tiled import tiled_attention
from diffattn.functional.tokens import Matching, match_tokens, merge_tokens, pool_tokens, sample_tokens, unmerge_tokens

__all__ = [
    "Matching",
    "agent_attention",
    "circulant_attention",
    "downsample_tokens",
    "downsampled_attention",
    "focused_linear_attention",
    "gather_bias",
    "inline_attention",
    "landmark_attention",
    "mamba_like_linear_attention",
    "match_tokens",
    "mediator_attention",
    "mediator_side",
    "merge_tokens",
    "pool_mediators",
    "pool_tokens",
    "resize_axis",
    "resize_mediators",
    "sample_tokens",
    "spread_bias",
    "tiled_attention",
    "unmerge_tokens",
]
