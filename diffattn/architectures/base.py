"""The interface of an architecture, and the processor that runs a method in one of its layers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, LayerSpec
from diffattn.noise_level import Reading, TimeReader
from diffattn.schedules import EXACT


class Processor(Protocol):
    """Our processor, which replaces one layer's own."""

    original: Any  # the processor object that it replaced
    active: bool  # False once the patch is removed: it then behaves like the original wherever it is still in use
    owner: Any  # the patch

    def reason_exact(self, phase: int, grid: tuple[int, int], num_tokens: int, device: str, mask_rows: int) -> str:
        """Why a call in a phase runs exact, or `ACCELERATED`; `grid`: rows and columns of the layer's tokens."""
        ...


class Architecture(Protocol):
    """How to access the parts of one family of denoisers. One file per family."""

    title: str  # supported classes, as listed in error messages
    sample_name: str  # name of the noisy input of `forward`
    time_name: str  # name of the time step of `forward`

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

    def grids(self, model: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens at every level, for latents of this size."""
        ...

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time step passed to the model; `levels` knows the scheduler in use."""
        ...

    def processor(self, **parts: Any) -> Processor:
        """Our processor for one layer of this family, built from the arguments of `MethodProcessor`."""
        ...


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
    ) -> None:
        self.layer = layer
        self.original = original
        self.methods = tuple(methods)
        self.functions: tuple[AttentionFn | None, ...] = tuple(m.build(layer) if m else None for m in methods)
        self.run = run
        self.tally = tally
        self.owner = owner
        self.active = True  # a processor reinstalled after its patch was removed behaves like the original

    def reason_exact(self, phase: int, grid: tuple[int, int], num_tokens: int, device: str, mask_rows: int) -> str:
        """Why a call in a phase runs exact, or `ACCELERATED`; `grid`: rows and columns of the layer's tokens."""
        if phase == EXACT_PHASE:
            return "the noise level is not known"
        method = self.methods[phase]
        if method is None:
            return f"{EXACT} by schedule"
        if num_tokens != grid[0] * grid[1]:
            return f"{num_tokens} tokens do not form the layer's grid of {grid[0]}x{grid[1]}"
        return method.declines(self.layer, num_tokens, device, mask_rows) or ACCELERATED

    def _call_under_way(self) -> DenoiserCall | None:
        """The current call; None outside the denoiser (which is counted), and once the patch is removed."""
        if not self.active:
            return None
        call = self.run.current()
        if call is None and not torch.compiler.is_compiling():
            self.tally.add(self.layer.name, OUTSIDE)
        return call

    def _reason_together(self, call: DenoiserCall, batch: int) -> str | None:
        """Why the samples of a call, each in its own phase, cannot be distinguished, or None."""
        if isinstance(call.phase, int) or batch == len(call.phase):
            return None
        return f"a batch of {batch} where {len(call.phase)} samples are in phases of their own"

    def _count(self, call: DenoiserCall, reason: str) -> None:
        if not (call.compiled or torch.compiler.is_compiling()):
            self.tally.add(self.layer.name, reason)

    def _function(self, call: DenoiserCall, phase: int, reason: str) -> AttentionFn | None:
        """The method's function for a phase; None if there is a reason to run exact, which is counted."""
        self._count(call, reason)
        return self.functions[phase] if reason == ACCELERATED else None

    def _apply(self, function: AttentionFn, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        """The output of the method's function [B, H, N, D]; counts the heads that it ran exact."""
        out = function(q, k, v, call)
        if call.exact_heads:
            self.tally.add(self.layer.name, EXACT_HEADS, call.exact_heads)
        return out


def by_phase(phases: int | tuple[int, ...], run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`run(phase, *tensors)`: once, or for the samples of each phase together.

    Args:
        phases: of the batch, or one per sample.
        run: returns a tensor [B, ...] for the samples passed to it.
        tensors: [B, ...], or [B·heads, ...] sample by sample, or [1, ...] for all samples.
    """
    if isinstance(phases, int):
        return run(phases, *tensors)
    groups = {phase: [i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))}
    device = next(x.device for x in tensors if x is not None)
    parts = []
    for phase, group in groups.items():
        rows = torch.tensor(group, device=device)
        parts.append(run(phase, *(None if x is None else _rows(x, rows, len(phases)) for x in tensors)))
    order = [i for group in groups.values() for i in group]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[torch.tensor(places, device=device)]


def genuine(processor: Any) -> Any:
    """The processor itself, or the original of one of ours that was reinstalled after its removal."""
    while isinstance(processor, MethodProcessor) and not processor.active:
        processor = processor.original
    return processor


def _rows(x: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The samples `rows` of a tensor with a batch dimension, or of a mask repeated per head or for all."""
    if x.shape[0] == 1:
        return x
    if x.shape[0] == batch:
        return x[rows]
    return x.unflatten(0, (batch, -1))[rows].flatten(0, 1)
