"""Agents that are landmarks: sampled from queries and keys, and corrected (Xiong et al., "Nyströmformer", AAAI 2021,
arXiv 2102.03902). The part of `methods.agent` that reuses what earlier calls of a layer determined.

Shapes: B batch, H heads, N tokens, n landmarks, c tokens without a position on the grid, D channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import sample_tokens
from diffattn.functional.coasting import LEAST_DAMPING, Calibration, calibrate, coast
from diffattn.functional.landmark import Heads, Tokens, exact_heads, exact_where_missed, landmark_attention_with_context
from diffattn.functional.tokens import pick_tokens
from diffattn.methods.base import LayerCall, TokenLayout

DEFAULT_HEAD_ERROR = 0.5


@dataclass(frozen=True)
class Landmarks:
    """The attention function of landmarks, with the options of `AgentAttention` that concern them."""

    count: Callable[[int], int]  # tokens of a layer -> landmarks
    damping: float
    max_head_error: float | None
    calibrate_every: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layout, mask = call.layout, call.mask
        image, asked, answering = layout.on_grid(q), self._sampled(q, layout), self._sampled(k, layout)
        masked = None if mask is None else self._sampled(_additive(mask).mT, layout).mT.to(q.dtype)
        tokens = Tokens(image, k, v, asked, answering, layout.num_context, mask, masked)
        if self.damping >= LEAST_DAMPING and not torch.is_grad_enabled():
            out, text, missed = self._coasting(tokens, call.memory)
            if missed is not None:
                out, call.exact_heads = exact_heads(out, missed, image, k, v, mask), len(missed[0])
            return _joined(out, text, q, k, v, call)
        out, text, error = landmark_attention_with_context(tokens, self.damping)
        most = self._most(q)
        if most is not None and not torch.compiler.is_compiling():
            out, call.exact_heads = exact_where_missed(out, error, image, k, v, most, mask)
        return _joined(out, text, q, k, v, call)

    def _most(self, q: Tensor) -> float | None:
        """The largest error of a head that does not run exact; None: heads are not checked."""
        return DEFAULT_HEAD_ERROR if self.max_head_error is None and q.device.type == "cpu" else self.max_head_error

    def _coasting(self, tokens: Tokens, memory: dict[str, Any] | None) -> tuple[Tensor, Tensor, Heads | None]:
        """The output of the image tokens and of the others, and the heads that must run exact. The heads come from the
        last calibration, which is renewed after `calibrate_every` calls."""
        # Compiled code cannot detect products of less than fp32's precision, but is guarded in any case.
        guarded = torch.compiler.is_compiling() or torch.get_float32_matmul_precision() != "highest"
        known: Coasting | None = None if memory is None or guarded else memory.get("landmarks")
        kind = (tokens.q.shape, tokens.k.shape, tokens.key_landmarks.shape, tokens.q.dtype, tokens.q.device)
        if known is not None and known.kind == kind and known.calls < self.calibrate_every:
            known.calls += 1
            return *coast(tokens, self.damping, known.calibration), known.missed
        out, text, calibration = calibrate(tokens, self.damping, guarded)
        most = self._most(tokens.q)
        missed = None if most is None or torch.compiler.is_compiling() else calibration.missed(most)
        if memory is not None:
            memory["landmarks"] = Coasting(kind, calibration, missed)
        return out, text, missed

    def _sampled(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """[B, H, N + c, D] -> [B, H, n + c, D]: sampled tokens of the picture, then all those of the context."""
        if layout.is_plain:
            return sample_tokens(x, layout.rows_and_columns, self.count(x.shape[2]))
        on_grid, start, parts = layout.on_grid(x), 0, []
        share = self.count(layout.num_tokens) / layout.num_tokens
        for grid in layout.grids:
            tokens = on_grid.narrow(2, start, prod(grid))
            start += prod(grid)
            number = max(round(share * prod(grid)), 1)
            if layout.rotated or len(grid) != 2:
                parts.append(pick_tokens(tokens, grid, number))
            else:
                parts.append(sample_tokens(tokens, (grid[0], grid[1]), number))
        return torch.cat((*parts, layout.context(x)), dim=2)


@dataclass
class Coasting:
    """A calibration in use."""

    kind: tuple[Any, ...]  # shapes, dtype and device of the tensors it is for
    calibration: Calibration
    missed: Heads | None
    calls: int = 1  # that have used it


def _joined(out: Tensor, text: Tensor, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    """The picture's output and that of the context, whose queries may have masks of their own."""
    if call.context_mask is not None:
        text = scaled_dot_product_attention(call.layout.context(q), k, v, attn_mask=call.context_mask)
    return call.layout.join(out, text)


def _additive(mask: Tensor) -> Tensor:
    """A mask as what is added to logits, so that the mean of several keys is masked if any of them is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
