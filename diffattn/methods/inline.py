"""InLine attention, training-free: the linear expansion of a softmax, in the heads whose logits are flat (Han et al.,
"Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024, arXiv 2412.06590).

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import inline_attention
from diffattn.functional.inline import inline_attention_and_error
from diffattn.functional.landmark import exact_where_missed
from diffattn.methods.base import AttentionFn, LayerCall, LayerSpec, Preset, upcast_where_half_overflows
from diffattn.methods.limited import LimitedMethod

FLAT = 0.1
"""The error of a first-order expansion where logits have a standard deviation of about 1."""


@dataclass(frozen=True)
class InLineAttention(LimitedMethod):
    """Options of InLine attention without its learned residual.

    The first-order expansion is accurate where the logits of a head are flat: the error is 0.02 at a standard
    deviation of 0.25 and 0.11 at 1; at 2 the expansion is useless. Which heads are flat depends on the layer, the noise
    level and the picture, so every call measures it: eight queries are also computed exactly, and a head whose error on
    them is too large falls back to exact attention. The report counts these heads.
    """

    max_head_error: float = FLAT
    """Heads whose relative error, estimated on eight queries, exceeds this fall back to exact attention. Above 0.
    Reading the error synchronises the device; in a compiled denoiser both are computed and nothing is saved. `inf`: no
    check."""
    min_tokens: int | None = None  # layers with fewer tokens run exact; None: as timed, else 1,024
    max_level: int | None = None  # deepest level that is accelerated, 0 is the highest resolution; None: all

    name: ClassVar[str] = "inline"
    presets: ClassVar[Mapping[str, Preset]] = {
        "balanced": Preset(),
        # Heads with logits up to a standard deviation of about 1.7.
        "fast": Preset(options={"max_head_error": 0.3}),
    }

    def __post_init__(self) -> None:
        error = self.max_head_error
        is_number = isinstance(error, int | float) and not isinstance(error, bool)
        if not is_number or not error > 0:
            raise ValueError(f"max_head_error must be a number above 0, inf included, got {error!r}")
        self.check_limits()

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        """Options for tuning, which itself measures the number of tokens from which this pays off."""
        return [{"max_head_error": error, "min_tokens": 0} for error in (FLAT / 2, FLAT, 3 * FLAT)]

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return "masked: the means of all keys cannot follow a mask" if mask_rows else None

    def build(self, layer: LayerSpec) -> AttentionFn:
        return upcast_where_half_overflows(layer, self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        if self.max_head_error == torch.inf:
            return inline_attention(q, k, v)
        out, error = inline_attention_and_error(q, k, v)
        if torch.compiler.is_compiling():
            flat = (error <= self.max_head_error)[..., None, None]
            return torch.where(flat, out, scaled_dot_product_attention(q, k, v))
        out, call.exact_heads = exact_where_missed(out, error, q, k, v, self.max_head_error)
        return out
