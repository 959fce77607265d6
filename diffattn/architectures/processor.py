"""The processor that runs a method in one attention layer, and decides call by call whether it does."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from diffattn.architectures.decisions import Decisions
from diffattn.architectures.faster import Faster, Ways
from diffattn.architectures.run_state import (
    ACCELERATED,
    EXACT_PHASE,
    HEADS,
    OUTSIDE,
    DenoiserCall,
    NotPickled,
    RunState,
    Tally,
)
from diffattn.methods.base import (
    EXACT_HEADS,
    EXACT_SHARE,
    AttentionFn,
    AttentionMethod,
    Grid,
    LayerCall,
    LayerSpec,
    TokenLayout,
)
from diffattn.schedules import EXACT

RENEWED_EVERY = 8
"""A layer that runs exact because of its heads is looked at anew after this many calls."""

WAITED = "calls that ran exact because of the heads"
"""In the memory of such a layer."""


class MethodProcessor(NotPickled):
    """Runs a method where it applies, and the layer's own attention everywhere else. One subclass per layout."""

    def __init__(
        self,
        layer: LayerSpec,
        original: Any,
        methods: Sequence[AttentionMethod | None],  # one per phase; None is exact
        run: RunState,
        tally: Tally,
        owner: Any = None,  # the patch
        decisions: Decisions | None = None,
    ) -> None:
        self.layer = layer
        self.original = original
        self.methods = tuple(methods)
        self.faster = Faster(layer, self.methods, run, Decisions() if decisions is None else decisions)
        self.functions: tuple[AttentionFn | None, ...] = tuple(m.build(layer) if m else None for m in methods)
        self.run = run
        self.tally = tally
        self.owner = owner
        self.fixed_heads: dict[int, tuple[int, ...]] = {}  # phase -> heads that run exact in compiled code
        self.active = True  # a processor reinstalled after its patch was removed behaves like the original

    def layout_of(
        self, grid: Grid, references: tuple[Grid, ...], num_tokens: int, context_first: bool | None = None
    ) -> TokenLayout:
        """The layout of a call's tokens; those beyond the grids are context, which does not fit a layer without any.

        Args:
            grid: of the layer's picture tokens.
            references: of its reference pictures.
            num_tokens: of the call.
            context_first: whether context comes first in this call; None: as in every call of the layer.
        """
        layer = self.layer
        if layer.copies > 1:
            references = (grid,) * (layer.copies - 1)
        if references and num_tokens < prod(grid) + sum(map(prod, references)):
            references = ()
        beyond = num_tokens - prod(grid) - sum(map(prod, references))
        grids = (*references, grid) if layer.references_first else (grid, *references)
        picture = len(references) if layer.references_first else 0
        first = layer.context == "first" if context_first is None else context_first
        return TokenLayout(grids, beyond, first, layer.rotated, picture)

    def reason_exact(
        self, phase: int, layout: TokenLayout, device: str, mask_rows: int, kind: str | None = None
    ) -> str:
        """Why a call in a phase runs exact, or `ACCELERATED`.

        Args:
            phase: of the schedule.
            layout: of the tokens.
            device: torch device type.
            mask_rows: see `AttentionMethod.reason_call`.
            kind: of the call, see `Faster`.
        """
        reason = self.reason_impossible(phase, layout, device, mask_rows)
        reason = reason or self.faster.reason_slower(phase, layout.num_tokens, device, kind)
        return reason or self._reason_fixed(phase) or ACCELERATED

    def reason_impossible(self, phase: int, layout: TokenLayout, device: str, mask_rows: int) -> str | None:
        """Why a call in a phase must run exact, whichever is faster, or None; arguments as in `reason_exact`."""
        if phase == EXACT_PHASE:
            return "the noise level is not known"
        method = self.methods[phase]
        if method is None:
            return f"{EXACT} by schedule"
        context = layout.num_context  # unknown while compiling a processor that drops the padding of the text
        if guard_or_false(context < 0) or (self.layer.context == "none" and context):
            tokens = layout.num_tokens + layout.num_context
            return f"{tokens} tokens do not form the layer's grid of {'x'.join(map(str, layout.grid))}"
        if reason := method.reason_layout(layout):
            return reason
        return method.reason_call(self.layer, layout.num_tokens, device, mask_rows)

    def fix_heads(self, phase: int, place: int, num_tokens: int, kind: str | None) -> None:
        """Fix the heads that compiled code runs exact in a phase: those that this call found, and those that other
        calls at its noise level found before it; all of them where the layer gains nothing otherwise.

        Args:
            phase: of the schedule.
            place: of the call, see `DenoiserCall`.
            num_tokens: of the picture.
            kind: of the call, see `Faster`.
        """
        method, heads = self.methods[phase], self.layer.num_heads
        memories = self.run.taken((self.layer.name, phase, place))
        if method is None or not memories:
            return
        found = set(self.fixed_heads.get(phase, ()) if place else ())
        for missed in (memory.get(EXACT_HEADS) for memory in memories):
            found.update(() if missed is None else missed[1].tolist())
        if len(found) > heads * self.faster.most_exact(phase, num_tokens, kind):
            found = set(range(heads))
        self.fixed_heads[phase] = tuple(sorted(found))

    def _reason_fixed(self, phase: int) -> str | None:
        """Why the layer runs exact in compiled code, as far as its heads are concerned, or None."""
        if len(self.fixed_heads.get(phase, ())) < self.layer.num_heads:
            return None
        return "most heads are too far from exact attention"

    def _reason_timed(
        self, call: DenoiserCall, phase: int, q: Tensor, num_tokens: int, kind: str | None, ways: Ways
    ) -> str | None:
        """Why a call that the method can take runs exact, whatever its heads, or None, after deciding which is faster.

        Args:
            call: of the denoiser.
            phase: of the schedule.
            q: the queries.
            num_tokens: see `AttentionMethod.reason_slower`.
            kind: of the call; None: do not decide.
            ways: the call by the method, and exactly.
        """
        if kind is not None and not call.compiled:
            self.faster.decide(phase, num_tokens, kind, q, ways)
        reason = self.faster.reason_slower(phase, num_tokens, q.device.type, kind)
        if reason is None and torch.compiler.is_compiling():
            reason = self._reason_fixed(phase)
        return reason

    def _reason_heads(self, phase: int, num_tokens: int, kind: str | None, memory: dict[str, Any] | None) -> str | None:
        """Why a call runs exact because too many of its heads would, or None; arguments as in `_reason_timed`, and
        `LayerCall.memory`. From time to time the method looks at the heads anew."""
        most = self.faster.most_exact(phase, num_tokens, kind)
        share = 0.0 if memory is None else memory.get(EXACT_SHARE, 0.0)
        if memory is None or (share <= most and share < 1):
            return None
        memory[WAITED] = memory.get(WAITED, 0) + 1
        if memory[WAITED] >= RENEWED_EVERY:
            memory.clear()
        return f"{share:.0%} of the heads are too far from exact attention"

    def _settling(self, call: DenoiserCall, q: Tensor, k: Tensor) -> tuple[Any, ...] | None:
        """What decides, within a run, whether an unmasked call runs exact, apart from its heads; None where that cannot
        be told from the call's shapes."""
        if torch.compiler.is_compiling() or not isinstance(call.phase, int) or call.contexts is not None:
            return None
        of_call = (call.phase, tuple(call.grids), call.references, call.context_first)
        return (self.layer.name, *of_call, q.shape, k.shape, q.dtype, q.device)

    def _settled(self, key: tuple[Any, ...] | None) -> str | None:
        """Why such a call ran exact before in this run, and does again; None: not known."""
        return None if key is None else self.run.settled.get(key)

    def _settle(self, key: tuple[Any, ...] | None, reason: str | None) -> None:
        """Keep a reason for the calls that follow in this run."""
        if key is not None and reason is not None:
            self.run.settled[key] = reason

    def _current_call(self) -> DenoiserCall | None:
        """The current call; None outside the denoiser (which is counted), and once the patch is removed."""
        if not self.active:
            return None
        call = self.run.current()
        if call is None and not torch.compiler.is_compiling():
            self.tally.add(self.layer.name, OUTSIDE)
        return call

    def _reason_together(self, call: DenoiserCall, batch: int) -> str | None:
        """Why a call runs exact in every layer, or because samples that differ cannot be separated; or None."""
        if call.exact:
            return call.exact
        if not isinstance(call.phase, int) and batch != len(call.phase):
            return f"a batch of {batch} where {len(call.phase)} samples are in phases of their own"
        if call.contexts is not None and batch != len(call.contexts):
            return f"a batch of {batch} where {len(call.contexts)} samples have texts of their own lengths"
        return None

    def _memory(self, call: DenoiserCall, phase: int, group: Any = None) -> dict[str, Any] | None:
        """See `LayerCall.memory`; `group`: what the samples of this part of the call share, where it is a part only."""
        compiled = torch.compiler.is_compiling() or (call.compiled and not call.looks)
        if compiled or call.place < 0 or torch.is_grad_enabled():
            return None
        place = call.place if group is None else (call.place, call.phase, call.contexts, group)
        return self.run.memory_of((self.layer.name, phase, place))

    def _count(self, call: DenoiserCall, reason: str) -> None:
        if not (call.compiled or torch.compiler.is_compiling()):
            self.tally.add(self.layer.name, reason)

    def _count_heads(self, call: LayerCall) -> None:
        """Count the heads that the method ran exact in a call; in compiled code the hook does."""
        known = self.run.call
        if call.exact_heads and not (known is not None and known.looks):
            self.tally.add(self.layer.name, HEADS, call.exact_heads)

    def _fixed_now(self, phase: int) -> tuple[int, ...]:
        """See `LayerCall.fixed_heads`."""
        return self.fixed_heads.get(phase, ()) if torch.compiler.is_compiling() else ()
