"""One patched denoiser: its layers, its working size, and why a layer would run exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from diffattn.architectures.base import Architecture, Replaced, Size
from diffattn.architectures.denoisers import is_compiled, uncompiled
from diffattn.architectures.plain_attention import install
from diffattn.architectures.plug import plug_of
from diffattn.architectures.processor import MethodProcessor
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall
from diffattn.machine import execution_device
from diffattn.methods.base import Grid, LayerSpec, TokenLayout
from diffattn.noise_level import Reading, TimeReader


@dataclass
class PatchedLayer:
    """One attention layer of a denoiser, patched or left alone."""

    spec: LayerSpec
    module: Any  # has processor
    runs: MethodProcessor | None = None  # runs the method
    processor: Any = None  # the one that the layer was given for it
    reason: str | None = None  # why it has no processor of ours
    displaced_by: str | None = None  # class of the processor that replaced ours
    is_reported: bool = False  # whether the user was warned of that
    earlier: WeakSet[MethodProcessor] = field(default_factory=WeakSet)  # those before `runs` that a caller may put back

    @property
    def all_runs(self) -> list[MethodProcessor]:
        """Everything that runs the method in this layer, earlier ones included."""
        return [*self.earlier, *([] if self.runs is None else [self.runs])]

    def renew(self, replaced: Replaced) -> None:
        """Install a new processor in place of the one that displaced ours."""
        if self.runs is not None:
            self.earlier.add(self.runs)
        self.runs, self.processor = replaced
        self.displaced_by, self.is_reported = None, False
        install(self.module, self.processor)

    def look(self) -> str | None:
        """The class of the processor that replaced ours; None if it is still ours or wraps it."""
        there = self.module.processor
        if there is not self.processor and self.processor is not None and self.is_ours(there):
            self.processor = there  # an earlier one, which a caller kept and put back
        is_there = there is self.processor or any(part is self.processor for part in _attributes(there))
        if self.processor is None or is_there:
            self.displaced_by, self.is_reported = None, False
        else:
            self.displaced_by = "the layer's own attention" if there is None else type(there).__name__
        return self.displaced_by

    def is_ours(self, processor: Any) -> bool:
        """Whether a processor runs a method for this layer and this patch."""
        runs = runs_of(processor)
        return runs is not None and self.runs is not None and runs.owner is self.runs.owner and runs.active


def runs_of(processor: Any) -> MethodProcessor | None:
    """The part of a processor of ours that runs the method; None for any other processor."""
    return processor if isinstance(processor, MethodProcessor) else plug_of(processor)


def _attributes(processor: Any) -> list[Any]:
    return list(getattr(processor, "__dict__", {}).values())


class Expected(NamedTuple):
    """What is known about a layer's call before it is made."""

    device: str  # torch device type
    mask_rows: int  # see `AttentionMethod.reason_call`
    batch: int | None  # samples; None: unknown
    dtypes: tuple[torch.dtype, ...]  # of the queries, the likeliest first: under autocast norms may keep float32


class PatchedDenoiser:
    """A denoiser and its attention layers.

    Attributes:
        model: the denoiser, compiled or not.
        layers: all of its attention layers, in order.
        draws: whether it draws, rather than steering the denoiser that does.
        grids: rows and columns of the tokens by level, of the last call.
        compiled: whether any part of it was compiled at the start of the run.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, layers: Sequence[PatchedLayer], *, draws: bool = True
    ) -> None:
        self.model = model
        self.draws = draws
        self.architecture = architecture
        self.layers = list(layers)
        self.grids: list[Grid] = []
        self.size = Size(0, 0)
        self.compiled = False
        self._looked: set[tuple[int, int]] = set()  # phase and place of calls that found the heads to run exact …
        self._looked_at: list[Grid] = []  # … of these grids

    @property
    def entry(self) -> nn.Module:
        """The submodule that every forward runs first."""
        return self.architecture.entry(uncompiled(self.model))

    @property
    def patched(self) -> list[PatchedLayer]:
        """The layers that carry our processor, or did before it was displaced."""
        return [layer for layer in self.layers if layer.runs is not None]

    def read_time(self, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time step passed to the denoiser."""
        return self.architecture.read_time(uncompiled(self.model), time, levels)

    def set_size(self, size: Size) -> tuple[Grid, ...]:
        """Prepare for calls on latents of this size; → `grids_for` it. Another thread may set another one meanwhile."""
        self.grids = grids = self.grids_for(size)
        self.size = size
        return tuple(grids)

    def grids_for(self, size: Size) -> list[Grid]:
        """The tokens by level, for latents of a size."""
        return list(self.architecture.grids(uncompiled(self.model), size.height, size.width, size.frames))

    def begin_run(self, size: Size) -> None:
        """Begin a run on latents of this size, possibly together with another denoiser of the patch."""
        self.set_size(size)
        self.compiled = is_compiled(self.model)

    def should_look(self, phase: int | tuple[int, ...], place: int) -> bool:
        """Whether methods should look for the heads that compiled code must run exact: at the first call in each phase,
        at this size. Not where diffusers' hooks, such as its caches, would take that for a call of their own."""
        if self.grids != self._looked_at:
            self._looked_at, self._looked = self.grids, set()
        if not self.compiled or not isinstance(phase, int) or place < 0 or (phase, place) in self._looked:
            return False
        if torch.is_grad_enabled() or any(map(_has_hooks, uncompiled(self.model).modules())):
            return False
        methods = [layer.runs.methods[phase] for layer in self.patched if layer.runs is not None and phase >= 0]
        return any(method is not None and method.checks_heads for method in methods)

    def end_look(self, call: DenoiserCall, expected: Expected) -> None:
        """Fix the heads that a call has found."""
        assert isinstance(call.phase, int)
        self._looked.add((call.phase, call.place))
        for layer in self.patched:
            if layer.runs is not None:
                layout, kind = self._expected(layer, call.grids, self.size, call.phase, expected)
                layer.runs.fix_heads(call.phase, call.place, layout.num_tokens, kind)

    def tokens(self, layer: LayerSpec) -> int | None:
        """Image tokens of a layer at the size of the last call."""
        if not self.grids:
            return None
        return prod(self.grids[layer.level])

    def reasons(self, phase: int, expected: Expected) -> list[tuple[str, str]]:
        """(layer, why exact) for the layers with our processors, in one phase at the size of the last call."""
        return [
            (layer.spec.name, self._reason(layer, self.grids, self.size, phase, expected))
            for layer in self.patched
            if layer.displaced_by is None
        ]

    def explain(self, size: Size, num_phases: int, batch: int | None = None) -> Mapping[str, list[str | None]]:
        """Self-attention layer -> why it runs exact in each phase, None where it is accelerated.

        Args:
            size: of the latents.
            num_phases: of the schedule.
            batch: samples in a call; None: guess what is faster, whatever was timed.
        """
        device, dtype = execution_device(self.model), next(self.model.parameters()).dtype
        grids, expected = self.grids_for(size), Expected(device.type, 0, batch, (dtype,))
        found: dict[str, list[str | None]] = {}
        for layer in self.layers:
            if layer.spec.is_cross_attention:
                continue
            if layer.runs is None:
                found[layer.spec.name] = [layer.reason] * num_phases
                continue
            reasons = [self._reason(layer, grids, size, phase, expected) for phase in range(num_phases)]
            found[layer.spec.name] = [None if reason == ACCELERATED else reason for reason in reasons]
        return found

    @classmethod
    def _reason(cls, layer: PatchedLayer, grids: Sequence[Grid], size: Size, phase: int, expected: Expected) -> str:
        assert layer.runs is not None
        if size.exact:
            return size.exact
        layout, kind = cls._expected(layer, grids, size, phase, expected)
        return layer.runs.reason_exact(phase, layout, expected.device, expected.mask_rows, kind)

    @staticmethod
    def _expected(
        layer: PatchedLayer, grids: Sequence[Grid], size: Size, phase: int, expected: Expected
    ) -> tuple[TokenLayout, str | None]:
        """The layout of a layer's tokens, and the kind of its calls where the batch is known."""
        assert layer.runs is not None
        grid = grids[layer.spec.level]
        tokens = prod(grid) + sum(map(prod, size.references))
        if layer.spec.context != "none":
            tokens += size.num_context
        layout = layer.runs.layout_of(grid, size.references, tokens)
        device, rows, batch, dtypes = expected
        if batch is None:
            return layout, None
        faster = layer.runs.faster
        kinds = [faster.kind_at(phase, device, dtype, batch, tokens, rows > 0) for dtype in dtypes]
        known = (kind for kind in kinds if kind is not None and faster.decisions.known(kind) is not None)
        return layout, next(known, kinds[0])


def attention_layers(prefix: str, model: nn.Module, architecture: Architecture) -> list[PatchedLayer]:
    """Every attention layer of a denoiser, named with the prefix; nothing is changed."""
    layers = architecture.layers(uncompiled(model))
    return [PatchedLayer(replace(spec, name=prefix + spec.name), module) for spec, module in layers]


def _has_hooks(module: nn.Module) -> bool:
    """Whether diffusers' hooks run with a module; pipelines that name a context for caches leave an empty registry."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)
