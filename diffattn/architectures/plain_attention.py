"""The processor for diffusers' plain `Attention` layout: separate q, k, v projections, tokens [B, N, C].

Shapes: B batch, H heads, N image tokens, D channels per head, C = H·D.
"""

import inspect
from math import isfinite, sqrt
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from diffattn.architectures.base import MethodProcessor, by_phase, genuine
from diffattn.architectures.run_state import DenoiserCall
from diffattn.methods.base import AttentionFn, LayerCall, LayerSpec

PLAIN_PROCESSORS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""Processors that compute plain softmax attention and nothing else, so that ours can replace them."""


HONOUR_SCALE = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)
"""Those of them whose softmax takes `attn.scale`; the others always use 1/√D."""

HONOUR_NORMS = (AttnProcessor2_0,)
"""Those of them that apply `attn.norm_q` and `attn.norm_k`."""


def reason_exact(module: torch.nn.Module) -> str | None:
    """Why a layer must keep its processor, or None."""
    if not isinstance(module, Attention):
        return f"attention class {type(module).__name__}"
    kind = type(genuine(module.processor))
    if kind not in PLAIN_PROCESSORS:
        return f"custom processor {kind.__name__}"
    if module.added_kv_proj_dim is not None:
        return "added key and value projections"
    return None


def spec_of(name: str, module: torch.nn.Module, level: int) -> LayerSpec:
    """What is known about a layer, whatever its attention class."""
    heads = int(getattr(module, "heads", 1))
    return LayerSpec(
        name=name,
        level=level,
        num_heads=heads,
        head_dim=int(getattr(module, "inner_dim", 0)) // heads,
        is_cross_attention=not isinstance(module, Attention) or module.is_cross_attention,
        upcast=bool(getattr(module, "upcast_attention", False) or getattr(module, "upcast_softmax", False)),
    )


class SelfAttentionProcessor(MethodProcessor):
    """Runs a method where it applies, and the layer's original processor object everywhere else."""

    def __new__(cls, *parts: Any, **named_parts: Any) -> Any:
        """`load_ip_adapter` creates processors as `processor.__class__()`; it gets diffusers' plain one."""
        return super().__new__(cls) if parts or named_parts else AttnProcessor2_0()

    def __init__(self, layer: LayerSpec, original: Any, *parts: Any, **named_parts: Any) -> None:
        super().__init__(layer, original, *parts, **named_parts)
        self._original_takes_temb = "temb" in inspect.signature(original.__call__).parameters
        kind = type(genuine(original))
        self._fused = kind is FusedAttnProcessor2_0
        self._honours_scale = kind in HONOUR_SCALE
        self._honours_norms = kind in HONOUR_NORMS

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, h, w]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        call = self._call_under_way()
        tensors = (hidden_states, encoder_hidden_states, attention_mask, temb)
        if call is None:
            return self._exact(attn, *tensors)
        together = "called as cross-attention" if encoder_hidden_states is not None else None
        if reason := together or self._reason_together(call, hidden_states.shape[0]):
            self._count(call, reason)
            return self._exact(attn, *tensors)
        return by_phase(call.phase, lambda phase, *tensors: self._run(call, phase, attn, *tensors), *tensors)

    def _run(
        self,
        call: DenoiserCall,
        phase: int,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """For samples in one phase: accelerate, or find the reason not to."""
        is_image = hidden_states.ndim == 4
        grid = (hidden_states.shape[2], hidden_states.shape[3]) if is_image else call.grids[self.layer.level]
        num_tokens = hidden_states.shape[-2] * (hidden_states.shape[-1] if is_image else 1)
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, num_tokens, hidden_states.shape[0])
            mask = mask.view(hidden_states.shape[0], attn.heads, -1, mask.shape[-1])  # [B, H, 1 or N, N]
        reason = self._reason_scale(attn)
        if reason is None:
            mask_rows = 0 if mask is None else mask.shape[2]
            reason = self.reason_exact(phase, grid, num_tokens, hidden_states.device.type, mask_rows)
        function = self._function(call, phase, reason)
        if function is None:
            return self._exact(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return self._attend(function, phase, grid, attn, hidden_states, mask, temb)

    def _exact(
        self, attn: Attention, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> Tensor:
        """Call the original processor object as usual."""
        named = {"temb": temb} if self._original_takes_temb else {}
        return self.original(attn, hidden_states, encoder_hidden_states=context, attention_mask=mask, **named)

    def _reason_scale(self, attn: Attention) -> str | None:
        """Why the layer's own scale keeps it exact, or None."""
        if not self._honours_scale or (isfinite(attn.scale) and attn.scale > 0):
            return None
        return f"attn.scale is {attn.scale}, not a number above 0"

    def _attend(
        self,
        function: AttentionFn,
        phase: int,
        grid: tuple[int, int],
        attn: Attention,
        hidden_states: Tensor,
        mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """Diffusers' `AttnProcessor2_0` with `function` in place of its softmax attention."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, N, C]
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        q, k, v = self._project(attn, hidden_states)  # [B, H, N, D]
        call = LayerCall(x=hidden_states, grid=grid, mask=mask, phase=phase)
        out = self._apply(function, q, k, v, call).transpose(1, 2).flatten(2).to(q.dtype)  # [B, N, C]

        for projection_or_dropout in attn.to_out or ():
            out = projection_or_dropout(out)
        if residual.ndim == 4:
            out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, C] -> q, k, v [B, H, N, D], normalised and scaled like in the original processor."""
        if self._fused:
            projected = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            projected = (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        q, k, v = (p.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projected)
        if self._honours_norms and attn.norm_q is not None:
            q = attn.norm_q(q)
        if self._honours_norms and attn.norm_k is not None:
            k = attn.norm_k(k)
        ratio = attn.scale * sqrt(q.shape[-1]) if self._honours_scale else 1.0  # a method's logits have 1/√D
        if abs(ratio - 1) > 1e-6:  # half on each side, so that products with pooled queries also have it once
            q, k = q * sqrt(ratio), k * sqrt(ratio)
        return q, k, v
