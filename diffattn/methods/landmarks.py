"""Agents that are landmarks: sampled from queries and keys, and corrected (Xiong et al., "Nyströmformer", AAAI 2021,
arXiv 2102.03902). The part of `methods.agent` that reuses what earlier calls of a layer determined.

Shapes: B batch, H heads, N tokens, n landmarks, c tokens without a position on the grid, D channels per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import sample_tokens
from diffattn.functional.coasting import LEAST_DAMPING, Calibration, Sent, calibrate, coast
from diffattn.functional.landmark import (
    Context,
    Heads,
    Tokens,
    exact_at,
    exact_heads,
    exact_where_missed,
    landmark_attention_with_context,
)
from diffattn.functional.tokens import pick_tokens
from diffattn.methods.base import EXACT_HEADS, EXACT_SHARE, LayerCall, TokenLayout

DEFAULT_HEAD_ERROR = 0.1
LOWEST = -1e30  # of a mask: the mean with other numbers still masks, and is no infinity


@dataclass(frozen=True)
class Landmarks:
    """The attention function of landmarks, with the options of `AgentAttention` that concern them."""

    count: Callable[[int, bool], int]  # tokens of the picture, and whether others are beside them -> landmarks
    damping: float
    max_head_error: float | None
    calibrate_every: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layout, mask = call.layout, call.mask
        image, asked, answering = layout.on_grid(q), self._sampled(q, layout), self._sampled(k, layout)
        if not layout.has_context:
            masked = None if mask is None else _joined(self._sampled(_additive(mask).mT, layout)).mT.to(q.dtype)
            tokens = Tokens(image, k, v, _joined(asked), _joined(answering), None, mask, masked)
        else:
            context = Context(*map(layout.context, (q, k, v)))
            weights = self._weights(q, mask, layout, [x.shape[2] for x in asked])
            tokens = Tokens(image, k, v, _joined(asked), _joined(answering), context, mask, weights)
        most = self._most(q, call)
        if self.damping >= LEAST_DAMPING and not torch.is_grad_enabled():
            out, text, missed = self._coasting(tokens, most, call.memory)
            if missed is not None:
                out, call.exact_heads = exact_heads(out, missed, image, k, v, mask), len(missed[0])
            elif call.fixed_heads:
                out = exact_at(out, call.fixed_heads, image, k, v, mask)
            return _with_context(out, text, q, k, v, call)
        out, text, error = landmark_attention_with_context(tokens, self.damping)
        if most is not None:
            out, call.exact_heads = exact_where_missed(out, error, image, k, v, most, mask)
        return _with_context(out, text, q, k, v, call)

    def _most(self, q: Tensor, call: LayerCall) -> float | None:
        """The largest error of a head that does not run exact; None: heads are not checked."""
        if call.is_trial or torch.compiler.is_compiling() or self.max_head_error == inf:
            return None
        if q.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing may be read while a graph is captured
            return None
        return DEFAULT_HEAD_ERROR if self.max_head_error is None else self.max_head_error

    def _coasting(
        self, tokens: Tokens, most: float | None, memory: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor, Heads | None]:
        """The output of the image tokens and of the others, and the heads that must run exact, those whose error is
        above `most`.

        The heads come from the last calibration, which is renewed after `calibrate_every` calls. On an accelerator, the
        first calibration of a phase waits for them; from later ones they are copied while the device goes on, and the
        next call takes them over, so that nothing depends on when the copy arrives.
        """
        # Compiled code cannot detect products of less than fp32's precision, but is guarded in any case.
        guarded = torch.compiler.is_compiling() or _has_coarse_products()
        known: Coasting | None = None if memory is None else memory.get("landmarks")
        kind = (tokens.q.shape, tokens.k.shape, tokens.key_landmarks.shape, tokens.q.dtype, tokens.q.device)
        known = known if known is not None and known.kind == kind else None
        if known is not None:
            known.take_over(most)
            if known.calls < self.calibrate_every and not guarded:
                known.calls += 1
                return *coast(tokens, self.damping, known.calibration), self._kept(known, memory)
        out, text, calibration = calibrate(tokens, self.damping, guarded)
        if known is None or most is None or _reads_at_once(tokens.q):
            new = Coasting(kind, calibration, None if most is None else calibration.missed(most))
        else:
            new = Coasting(kind, calibration, known.missed, sent=calibration.sent())
        if memory is not None:
            memory["landmarks"] = new
        return out, text, self._kept(new, memory)

    @staticmethod
    def _kept(known: "Coasting", memory: dict[str, Any] | None) -> Heads | None:
        """The heads that must run exact, whose share is kept for the calls to come."""
        if memory is not None:
            heads = known.kind[0][0] * known.kind[0][1]
            memory[EXACT_SHARE] = 0.0 if known.missed is None else len(known.missed[0]) / heads
            memory[EXACT_HEADS] = known.missed
        return known.missed

    def _sampled(self, x: Tensor, layout: TokenLayout) -> list[Tensor]:
        """[B, H, N + c, D] -> [B, H, n, D] each: sampled tokens of the picture, and of its references."""
        if layout.is_plain:
            return [sample_tokens(x, layout.rows_and_columns, self.count(x.shape[2], False))]
        on_grid, start, parts = layout.on_grid(x), 0, []
        share = self.count(layout.num_tokens, layout.has_context) / layout.num_tokens
        for grid in layout.grids:
            tokens = on_grid.narrow(2, start, prod(grid))
            start += prod(grid)
            number = max(round(share * prod(grid)), 1)
            if layout.rotated or len(grid) != 2:
                parts.append(pick_tokens(tokens, grid, number))
            else:
                parts.append(sample_tokens(tokens, (grid[0], grid[1]), number))
        return parts

    def _weights(self, q: Tensor, mask: Tensor | None, layout: TokenLayout, number: Sequence[int]) -> Tensor:
        """What is added to the logits of landmarks and of the context beside them [B or 1, H or 1, 1, n + c]: the
        logarithm of the number of tokens that each represents, and a mask.

        Args:
            q: as in a call; for dtype and device.
            mask: of the call.
            layout: of the call.
            number: of landmarks, by grid.
        """
        sizes = [q.new_full((n,), log(prod(grid) / n)) for grid, n in zip(layout.grids, number, strict=True)]
        weights = torch.cat((*sizes, q.new_zeros(layout.num_context)))[None, None, None]
        if mask is None:
            return weights
        masked = _additive(mask).mT
        return torch.cat((*self._sampled(masked, layout), layout.context(masked)), dim=2).mT.to(q.dtype) + weights


@dataclass
class Coasting:
    """A calibration in use."""

    kind: tuple[Any, ...]  # shapes, dtype and device of the tensors it is for, those of the queries first
    calibration: Calibration
    missed: Heads | None
    calls: int = 1  # that have used it
    sent: Sent | None = None  # what `missed` is to follow from in the next call

    def take_over(self, most: float | None) -> None:
        """Renew `missed` by what was sent during the last call, if anything was."""
        if self.sent is not None and most is not None:
            self.missed, self.sent = self.sent.missed(most), None


def _has_coarse_products() -> bool:
    """Whether products of float32 matrices may be less precise than that (TF32, bfloat16)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it refuses to answer where `torch.backends.fp32_precision` or one of its parts is below fp32
        return True


def _reads_at_once(x: Tensor) -> bool:
    """Whether reading a tensor does not wait for a device."""
    return x.device.type == "cpu"


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _with_context(out: Tensor, text: Tensor, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    """The picture's output and that of the context, whose queries may have masks of their own."""
    if call.context_mask is not None:
        text = scaled_dot_product_attention(call.layout.context(q), k, v, attn_mask=call.context_mask)
    return call.layout.join(out, text)


def _additive(mask: Tensor) -> Tensor:
    """A mask as what is added to logits, so that the mean of several keys is masked if any of them is. Finite, since
    between two infinities there is no number."""
    if mask.dtype != torch.bool:
        return mask.float().clamp(min=LOWEST)
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, LOWEST)
