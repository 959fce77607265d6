"""The interface of an architecture, and the processor that runs a method in one of its layers."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false

from diffattn.architectures.decisions import (
    SECONDS_PER_RUN,
    Decision,
    Decisions,
    can_measure,
    kind_of,
    kind_text,
    label_of,
)
from diffattn.architectures.run_state import (
    ACCELERATED,
    EXACT_HEADS,
    EXACT_PHASE,
    OUTSIDE,
    DenoiserCall,
    NotPickled,
    RunState,
    Tally,
)
from diffattn.methods.base import AttentionFn, AttentionMethod, Grid, LayerCall, LayerSpec, TokenLayout
from diffattn.noise_level import Reading, TimeReader
from diffattn.schedules import EXACT

Ways = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""A call of attention by a method, and the same call done exactly."""


class Size(NamedTuple):
    """What a denoiser call works on, in its latents' pixels."""

    height: int
    width: int
    frames: int | None = None  # of a video's latents
    references: tuple[Grid, ...] = ()  # tokens of reference pictures beside the picture's, at every level
    num_context: int = 0  # tokens of text beside the picture's, as far as known before the call
    context_first: bool | None = None  # whether they precede the picture's; None: wherever the layer has them
    same_mask: bool = False  # whether a mask with a row per query has the same row for all queries of the picture
    contexts: tuple[int, ...] | None = None  # of each sample, where they differ; padding follows all of its tokens
    exact: str | None = None  # why no layer can be accelerated in this call


class Architecture(Protocol):
    """How to access the parts of one family of denoisers. One file per family."""

    @property
    def title(self) -> str:
        """The supported classes, as listed in error messages."""
        ...

    @property
    def sample_name(self) -> str:
        """The name of the noisy input of `forward`."""
        ...

    @property
    def time_name(self) -> str:
        """Name of the time step of `forward`."""
        ...

    def matches(self, model: nn.Module) -> bool:
        """Whether this family covers the model."""
        ...

    def layers(self, model: nn.Module) -> Iterable[tuple[LayerSpec, nn.Module]]:
        """Every attention layer, with the module that has `set_processor`."""
        ...

    def reason_exact(self, module: nn.Module) -> str | None:
        """Why a layer must keep its processor, or None."""
        ...

    def entry(self, model: nn.Module) -> nn.Module:
        """A submodule that every forward runs before any attention, and that gradient checkpointing does not repeat."""
        ...

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        """The noisy input [B, ...] among the arguments of `forward`."""
        ...

    def timestep(self, given: Mapping[str, Any]) -> Any:
        """The time step among the arguments of `forward`."""
        ...

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        """The size of the latents among the arguments of `forward`."""
        ...

    def grids(self, model: nn.Module, height: int, width: int, frames: int | None = None) -> Sequence[Grid]:
        """The tokens at every level, for latents of this size: rows and columns, or frames, rows and columns."""
        ...

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time step passed to the model; `levels` knows the scheduler in use."""
        ...

    def replaced(self, **parts: Any) -> "Replaced":
        """What replaces one layer's attention, built from the arguments of `MethodProcessor`."""
        ...


class Replaced(NamedTuple):
    """One layer's attention, replaced."""

    runs: "MethodProcessor"  # what runs the method
    processor: Any  # what the layer is given for it, perhaps the same object


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
        self.labels = tuple(label_of(m) if m else None for m in methods)
        self.decisions = Decisions() if decisions is None else decisions
        self.functions: tuple[AttentionFn | None, ...] = tuple(m.build(layer) if m else None for m in methods)
        self.run = run
        self.tally = tally
        self.owner = owner
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
            kind: of the call, see `decisions`; None: guess which is faster.
        """
        reason = self.reason_impossible(phase, layout, device, mask_rows)
        return reason or self._reason_slower(phase, layout.num_tokens, device, kind) or ACCELERATED

    def _reason_slower(self, phase: int, num_tokens: int, device: str, kind: str | None) -> str | None:
        """Why exact attention is used where the method could run, or None."""
        method = self.methods[phase]
        assert method is not None
        guess = method.reason_slower(num_tokens, device)
        if kind is None or not method.timed or method.is_size_given:
            return guess
        known = self.decisions.known(kind) if self.decisions.any_known else None
        faster = guess is None if known is None else known.faster
        if not torch.compiler.is_compiling():  # compiled code must not depend on the run
            faster = self.run.decided.get(kind, faster)
        if faster:
            return None
        return guess if guess and known is None else f"{num_tokens} tokens: exact attention is faster here"

    def _reason_timed(
        self, call: DenoiserCall, phase: int, q: Tensor, num_tokens: int, kind: str | None, ways: Ways
    ) -> str:
        """Why a call that the method can take runs exact, or `ACCELERATED`, after deciding which is faster.

        Args:
            call: of the denoiser.
            phase: of the schedule.
            q: the queries.
            num_tokens: see `AttentionMethod.reason_slower`.
            kind: of the call; None: do not decide.
            ways: the call by the method, and exactly.
        """
        if kind is not None and not call.compiled:
            self._decide(phase, kind, q, num_tokens, ways)
        return self._reason_slower(phase, num_tokens, q.device.type, kind) or ACCELERATED

    def _decide(self, phase: int, kind: str, q: Tensor, num_tokens: int, ways: Ways) -> None:
        """Decide whether this run uses the method for a kind of call, unless that is settled: by what is known, by
        timing both, or by a guess. Arguments as in `_reason_timed`."""
        chosen, run, decisions = self.methods[phase], self.run, self.decisions
        assert chosen is not None
        if not chosen.timed or chosen.is_size_given:
            return
        if kind not in run.decided:
            decision, device = decisions.known(kind), q.device
            has_time = device.type == "cpu" or run.timing <= SECONDS_PER_RUN
            if decision is None and decisions.measures and has_time and can_measure(q):
                start = time.monotonic()
                decision = decisions.measure(kind, *ways, device)
                run.timing += time.monotonic() - start
            if decision is None:
                decision = Decision(chosen.reason_slower(num_tokens, device.type) is None, "from the table")
            run.decided[kind] = decision.faster
            decisions.use(self.layer.name, kind, decision)
        elif not decisions.is_noted(self.layer.name, kind):
            known = decisions.known(kind) or Decision(run.decided[kind], "from the table")
            decisions.use(self.layer.name, kind, known)

    def _kind(self, phase: int, q: Tensor, k: Tensor, heads_first: bool, masked: bool) -> str | None:
        """The kind of a call, see `kind_of`; None where it is not needed. Compiled code cannot name sizes that vary: it
        only looks up what is known."""
        label = self.labels[phase]
        if label is None or (torch.compiler.is_compiling() and not self.decisions.any_known):
            return None
        return kind_of(label, q, k, heads_first, masked)

    def kind_at(self, phase: int, device: str, dtype: torch.dtype, batch: int, tokens: int, masked: bool) -> str | None:
        """The kind of a call that is expected of the layer."""
        label, layer = self.labels[phase] if phase >= 0 else None, self.layer
        if label is None or layer.keys_only:
            return None
        shape = (batch, layer.num_heads, tokens, layer.head_dim)
        return kind_text(label, device, dtype, shape, masked=masked)

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

    def _memory(self, call: DenoiserCall, phase: int) -> dict[str, Any] | None:
        """See `LayerCall.memory`."""
        if torch.compiler.is_compiling() or call.compiled or call.place < 0 or torch.is_grad_enabled():
            return None
        return self.run.memory.setdefault((self.layer.name, phase, call.place), {})

    def _scratch(self, call: DenoiserCall, phase: int) -> dict[str, Any] | None:
        """Memory for calls that are only timed."""
        return None if self._memory(call, phase) is None else {}

    def _count(self, call: DenoiserCall, reason: str) -> None:
        if not (call.compiled or torch.compiler.is_compiling()):
            self.tally.add(self.layer.name, reason)

    def _count_heads(self, call: LayerCall) -> None:
        """Count the heads that the method ran exact in a call."""
        if call.exact_heads:
            self.tally.add(self.layer.name, EXACT_HEADS, call.exact_heads)


def by_phase(phases: int | tuple[Any, ...], run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`run(phase, *tensors)`: once, or for the samples of each phase together.

    Args:
        phases: of the batch, or one per sample, perhaps with more that distinguishes samples.
        run: returns a tensor [B, ...] for the samples passed to it.
        tensors: [B, ...], or [B·heads, ...] sample by sample, or [1, ...] for all samples.
    """
    if isinstance(phases, int):
        return run(phases, *tensors)
    groups = {phase: [i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))}
    if len(groups) == 1:
        return run(phases[0], *tensors)
    out: Tensor | None = None
    for phase, group in groups.items():
        part = run(phase, *(None if x is None else _rows(x, group, len(phases)) for x in tensors))
        if out is None:
            out = part.new_empty(len(phases), *part.shape[1:])
        out[torch.tensor(group, device=part.device)] = part
    assert out is not None
    return out


def _rows(x: Tensor, group: list[int], batch: int) -> Tensor:
    """The samples `group` of a tensor with a batch dimension, or of a mask repeated per head or for all; where they
    follow each other, a view."""
    if x.shape[0] == 1:
        return x
    if x.shape[0] != batch:
        return _rows(x.unflatten(0, (batch, -1)), group, batch).flatten(0, 1)
    if group[-1] - group[0] == len(group) - 1:
        return x[group[0] : group[-1] + 1]
    return x[torch.tensor(group, device=x.device)]
