"""Pure tensor functions. Nothing here knows of diffusers, layers or configuration."""

from diffattn.functional.agent import agent_attention
from diffattn.functional.tokens import Matching, match_tokens, merge_tokens, pool_tokens, unmerge_tokens

__all__ = [
    "Matching",
    "agent_attention",
    "match_tokens",
    "merge_tokens",
    "pool_tokens",
    "unmerge_tokens",
]
