"""What a plugged processor runs instead of its call of attention: a method where it applies, otherwise that very call.

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite, sqrt
from typing import Any

from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import Tensor
from torch.nn.functional import pad

from diffattn.architectures.by_phase import by_phase
from diffattn.architectures.faster import Ways
from diffattn.architectures.processor import MethodProcessor
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall
from diffattn.methods.base import AttentionFn, LayerCall, TokenLayout

ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""What follows q, k and v in the functions that processors call, in this order."""


class LayerPlug(MethodProcessor):
    """The method of one layer, behind the attention call of its processor."""

    honours_scale = False  # whether the original multiplies logits by `attn.scale` instead of 1/√D

    def attend(
        self,
        function: Callable[..., Tensor],
        heads_first: bool,
        attn: Any,
        x: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Replace `function(q, k, v, *args, **kwargs)`, which is called if the method does not apply.

        Args:
            function: what the processor calls.
            heads_first: whether q, k and v are [B, H, N, D], rather than [B, N, H, D].
            attn: the layer.
            x: its input.
        """
        call = self._current_call()
        if call is None:
            return function(q, k, v, *args, **kwargs)
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        reason = self._reason_together(call, q.shape[0]) or self._reason_call(q, k, given, heads_first)
        if reason is None:
            reason = self._reason_layer(attn)
        key = self._settling(call, q, k) if given.get("attn_mask") is None else None
        reason = reason or self._settled(key)
        if reason is not None:
            self._count(call, reason)
            return function(q, k, v, *args, **kwargs)
        tokens, counted = 2 if heads_first else 1, set()
        places = (x if x is not None and x.ndim == 3 and x.shape[0] == q.shape[0] else None, q, k, v)

        def run(place: Any, *tensors: Tensor) -> Tensor:
            x, q, k, v, mask = tensors
            phase, context = place if isinstance(place, tuple) else (place, None)
            layout = self._layout(call, k.shape[tokens], context)
            of_picture, of_context = _masks(call, layout, mask)
            rows = 0 if of_picture is None else of_picture.shape[-2]
            named = given if place == call.phase else given | {"attn_mask": mask}

            def by_method(memory: dict[str, Any] | None, is_trial: bool) -> tuple[Tensor, LayerCall]:
                made = LayerCall(
                    x, layout.grid, of_picture, of_context, phase=phase, layout=layout, memory=memory,
                    is_trial=is_trial, fixed_heads=self._fixed_now(phase),
                )  # fmt: skip
                scaled = self._scaled(q, k, v, self._scale(attn, given), heads_first)
                out = self._over(self.functions[phase], *scaled, made).to(v.dtype)  # type: ignore[arg-type]
                return out if heads_first else out.transpose(1, 2), made

            reason = self.reason_impossible(phase, layout, q.device.type, rows)
            if self.layer.keys_only and q.shape[tokens] != layout.num_tokens:
                reason = f"{q.shape[tokens]} queries, which are not the picture's {layout.num_tokens}"
            memory = self._memory(call, phase, None if place == call.phase else place)
            ways = Ways(by_method, lambda: function(q, k, v, **named), memory)
            kind = None if reason else self.faster.kind(phase, q, k, heads_first, mask is not None)
            reason = reason or self._reason_timed(call, phase, q, layout.num_tokens, kind, ways)
            self._settle(key, reason)
            reason = reason or self._reason_heads(phase, layout.num_tokens, kind, memory) or ACCELERATED
            if (phase, reason) not in counted:  # once, however many groups the samples form
                counted.add((phase, reason))
                self._count(call, reason)
            if reason != ACCELERATED:
                return ways.exact()
            out, layer_call = ways.method()
            self._count_heads(layer_call)
            return out

        return by_phase(self._places(call, k.shape[tokens]), run, *places, _repeated(given.get("attn_mask")))

    def _over(self, method: AttentionFn, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        """The method's output [B, H, N, D] for tokens that padding may follow, and queries of all tokens or only of the
        picture's."""
        layout, num_queries = call.layout, q.shape[2]
        end = layout.num_tokens + layout.num_context
        if k.shape[2] > end:
            q, k, v = (x[:, :, :end] for x in (q, k, v))
            call.x = None if call.x is None else call.x[:, :end]
            call.mask = None if call.mask is None else call.mask[..., :end]
            call.context_mask = None if call.context_mask is None else call.context_mask[..., :end]
        if self.layer.keys_only:  # any vectors may replace the missing queries, since their output is discarded
            out = layout.on_grid(method(layout.join(q, layout.context(k)), k, v, call))
        else:
            out = method(q, k, v, call)
        return pad(out, (0, 0, 0, num_queries - out.shape[2])) if out.shape[2] < num_queries else out

    def count_exact(self, reason: str) -> None:
        """Count a call that bypasses `attend`."""
        call = self._current_call()
        if call is not None:
            self._count(call, call.exact or reason)

    def will_run(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> bool:
        """Whether a call of a layer on image tokens, x [B, N, C] or [B, C, h, w], will run the method in any phase; if
        not, count the reason."""
        call = self._current_call()
        if call is None:
            return False
        is_cross = context is not None and context is not x  # Kandinsky 3 passes a layer's own tokens as context
        is_cross = is_cross and not self.layer.keys_only  # the context's keys are added to those
        reason = "called as cross-attention" if is_cross else self._reason_together(call, x.shape[0])
        reason = reason or self._reason_layer(attn)
        if reason is None and (attn.norm_q is not None or attn.norm_k is not None):
            reason = f"{type(self.original).__name__} leaves out the layer's norms of queries and keys"
        if reason is None:
            tokens = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1]
            rows = 0 if mask is None else mask.shape[-2] if mask.ndim > 2 else 1
            phases = {call.phase} if isinstance(call.phase, int) else set(call.phase)
            layout = self._layout(call, tokens)
            reasons = [self.reason_exact(phase, layout, x.device.type, rows) for phase in sorted(phases)]
            if ACCELERATED in reasons:
                return True
            reason = reasons[0]
        self._count(call, reason)
        return False

    def _layout(self, call: DenoiserCall, num_tokens: int, context: int | None = None) -> TokenLayout:
        """The layout of a call's tokens; those beyond the grid are context if the layer has any.

        Args:
            call: the call of the denoiser.
            num_tokens: of the call of the layer.
            context: how many of them are context, if padding follows.
        """
        layout = self.layout_of(call.grids[self.layer.level], call.references, num_tokens, call.context_first)
        return layout if context is None else replace(layout, num_context=context)

    def _places(self, call: DenoiserCall, num_tokens: int) -> int | tuple[Any, ...]:
        """The phase, or one per sample, with the number of its context tokens if padding follows."""
        contexts = call.contexts
        if contexts is None or self._layout(call, num_tokens).num_context < max(contexts):
            return call.phase
        if call.compiled and len(set(contexts)) == 1:  # so that code is not recompiled for every length of a text
            return call.phase
        phases = (call.phase,) * len(contexts) if isinstance(call.phase, int) else call.phase
        return tuple(zip(phases, contexts, strict=True))

    def _reason_call(self, q: Tensor, k: Tensor, given: Mapping[str, Any], heads_first: bool) -> str | None:
        """Why the arguments of the call require exact attention, or None."""
        tokens = 2 if heads_first else 1
        mask = given.get("attn_mask")
        if q.ndim != 4:
            return f"queries of {q.ndim} dimensions"
        if q.shape[tokens] != k.shape[tokens] and not self.layer.keys_only:
            return "called as cross-attention"
        if mask is not None and not isinstance(mask, Tensor):
            return f"masked by a {type(mask).__name__}"
        is_by_key = not heads_first and mask is not None and mask.shape == (k.shape[0], k.shape[1])
        if mask is not None and mask.ndim != 4 and not is_by_key:
            return f"a mask of {mask.ndim} dimensions"
        if given.get("dropout_p"):
            return "dropout"
        if given.get("is_causal"):
            return "causal"
        if given.get("parallel_config") is not None:
            return "context parallel"
        scale = given.get("scale")
        return None if scale is None or scale > 0 else f"a scale of {scale}"

    def _reason_layer(self, attn: Any) -> str | None:
        """Why the layer itself currently runs exact, or None: its own scale, or a guider that skips its weights."""
        if _skips_scores(attn):
            return "perturbed by a guider, which replaces its attention by the values"
        if not self.honours_scale or (isfinite(attn.scale) and attn.scale > 0):
            return None
        return f"attn.scale is {attn.scale}, not a number above 0"

    def _scale(self, attn: Any, given: Mapping[str, Any]) -> float | None:
        return attn.scale if self.honours_scale else given.get("scale")

    @staticmethod
    def _scaled(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, heads_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convert q, k, v to [B, H, N, D], with equally many heads, for logits scaled by 1/√D."""
        if not heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if k.shape[1] != q.shape[1]:  # grouped queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        ratio = 1.0 if scale is None else scale * sqrt(q.shape[-1])
        if abs(ratio - 1) > 1e-6:  # half on each side, so that products with pooled queries also have it once
            q, k = q * sqrt(ratio), k * sqrt(ratio)
        return q, k, v


def _skips_scores(attn: Any) -> bool:
    """Whether diffusers' perturbed-attention guidance is at work on a layer."""
    registry = getattr(attn, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    return any(isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in hooks)


def _masks(call: DenoiserCall, layout: TokenLayout, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the picture's queries, and that of the context's where it is another: a mask with a row per query is
    reduced to one row where the call says that all queries of the picture have the same."""
    if mask is None or mask.shape[-2] == 1 or not call.same_mask or layout.num_context < 0:
        return mask, None
    return layout.on_grid(mask)[..., :1, :], layout.context(mask)


def _repeated(mask: Tensor | None) -> Tensor | None:
    """A mask as [B or 1, H or 1, 1 or N, M], with one row where it is the same for all queries."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None]
    return mask[..., :1, :] if mask.stride(-2) == 0 else mask
