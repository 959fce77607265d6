"""Training with fewer keys in joint attention, at a fraction of the time.

Two things make the keys of a training step fewer than those of a drawing:

- `StableDiffusion3Pipeline` without T5 gives the transformer 256 equal tokens beside CLIP's, zeros. Tokens without a
  place that begin equal stay equal through all layers, so one of them whose key counts 256 times (log 256 on its
  logit) gives the same outputs and the same gradients.
- The keys of the picture may be a grid of every s-th token per axis from a corner drawn anew at each step, each of
  which counts s² times beside the text. Neighbouring keys are alike; see `emoji_sd/strided_keys.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

T5_TOKENS = 256  # what StableDiffusion3Pipeline appends when it has no third text encoder


class FewerKeys:
    """The joint attention of SD3; the last text token stands for `T5_TOKENS` equal ones.

    Args:
        stride: of the picture's keys, per axis; 1: all.
    """

    def __init__(self, stride: int = 1):
        self.stride = stride
        self.corner = (0, 0)  # first row and column of the grid

    def draw_corner(self, rng: torch.Generator) -> None:
        row, column = torch.randint(self.stride, (2,), generator=rng).tolist()
        self.corner = (row, column)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, N, C] of a square picture, encoder_hidden_states [B, T, C] of the text. → the same two"""
        part: Any = attn
        n, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        kept = self._grid(hidden_states)

        def heads(of_picture: Tensor, of_text: Tensor, norms: tuple[Any, Any] = (None, None)) -> Tensor:
            parts = zip((of_picture, of_text), norms, strict=True)
            return torch.cat([self._heads(part.heads, x, norm) for x, norm in parts], dim=2)

        q = heads(part.to_q(hidden_states), part.add_q_proj(encoder_hidden_states), (part.norm_q, part.norm_added_q))
        k = heads(part.to_k(kept), part.add_k_proj(encoder_hidden_states), (part.norm_k, part.norm_added_k))
        v = heads(part.to_v(kept), part.add_v_proj(encoder_hidden_states))
        counts = torch.ones(kept.shape[1] + text)
        counts[: kept.shape[1]] = self.stride**2
        counts[-1] = T5_TOKENS
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=counts.log().to(q)[None, None, None])
        out = out.transpose(1, 2).flatten(2)
        picture, words = out[:, :n], out[:, n:]
        if not part.context_pre_only:
            words = part.to_add_out(words)
        return part.to_out[0](picture), words

    def _grid(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        b, n, c = x.shape
        side = math.isqrt(n)
        rows, columns = (slice(first, None, self.stride) for first in self.corner)
        return x.view(b, side, side, c)[:, rows, columns].reshape(b, -1, c)

    @staticmethod
    def _heads(count: int, x: Tensor, norm: Any) -> Tensor:
        """[B, N, C] → [B, H, N, D], normalised"""
        x = x.unflatten(-1, (count, -1)).transpose(1, 2)
        return x if norm is None else norm(x).to(x.dtype)


def use_fewer_keys(transformer: SD3Transformer2DModel, stride: int) -> list[FewerKeys]:
    """A processor per layer, which are returned in their order."""
    found = []
    for block in transformer.transformer_blocks:
        processor = FewerKeys(stride)
        block.attn.set_processor(processor)  # type: ignore[operator,union-attr]
        found.append(processor)
    return found
