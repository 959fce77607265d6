"""One patched denoiser: its layers, its working size, and why a layer would run exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from diffattn.architectures.base import Architecture, Processor
from diffattn.architectures.denoisers import is_compiled, uncompiled
from diffattn.architectures.run_state import ACCELERATED
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import Reading, TimeReader


@dataclass
class PatchedLayer:
    """One attention layer of a denoiser, patched or left alone."""

    spec: LayerSpec
    module: Any  # has set_processor and processor
    processor: Processor | None = None  # ours
    left_alone: str | None = None  # why it has no processor of ours
    displaced_by: str | None = None  # class of the processor that replaced ours

    def look(self) -> str | None:
        """The class of the processor that replaced ours; None if it is still ours or wraps it."""
        there = self.module.processor
        ours = [there, *getattr(there, "__dict__", {}).values()]
        if self.processor is None or any(part is self.processor for part in ours):
            self.displaced_by = None
        else:
            self.displaced_by = "the layer's own attention" if there is None else type(there).__name__
        return self.displaced_by


class PatchedDenoiser:
    """A denoiser and its attention layers.

    Attributes:
        model: the denoiser, compiled or not.
        layers: all of its attention layers, in order.
        grids: rows and columns of the tokens by level, of the last call.
        compiled: whether any part of it was compiled at the start of the run.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, layers: Sequence[PatchedLayer]) -> None:
        self.model = model
        self.architecture = architecture
        self.layers = list(layers)
        self.grids: list[tuple[int, int]] = []
        self.compiled = False

    @property
    def entry(self) -> nn.Module:
        """The submodule that every forward runs first."""
        return self.architecture.entry(uncompiled(self.model))

    @property
    def patched(self) -> list[PatchedLayer]:
        """The layers that carry our processor, or did before it was displaced."""
        return [layer for layer in self.layers if layer.processor is not None]

    def read_time(self, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time step passed to the denoiser."""
        return self.architecture.read_time(uncompiled(self.model), time, levels)

    def set_size(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Prepare for calls on latents of this size; → `grids_for` it. Another thread may set another one meanwhile."""
        self.grids = grids = self.grids_for(height, width)
        return tuple(grids)

    def grids_for(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens by level, for latents of a size."""
        return self.architecture.grids(uncompiled(self.model), height, width)

    def begin_run(self, height: int, width: int) -> None:
        """Begin a run on latents of this size, possibly together with another denoiser of the patch."""
        self.set_size(height, width)
        self.compiled = is_compiled(self.model)

    def tokens(self, layer: LayerSpec) -> int | None:
        """Image tokens of a layer at the size of the last call."""
        if not self.grids:
            return None
        rows, columns = self.grids[layer.level]
        return rows * columns

    def reasons(self, phase: int, device: str, mask_rows: int) -> list[tuple[str, str]]:
        """(layer, why exact) for the layers with our processors, in one phase at the size of the last call."""
        return [
            (layer.spec.name, self._reason(layer, self.grids, phase, device, mask_rows))
            for layer in self.patched
            if layer.displaced_by is None
        ]

    def explain(self, height: int, width: int, num_phases: int) -> Mapping[str, list[str | None]]:
        """Self-attention layer -> why it runs exact in each phase, None where it is accelerated."""
        grids, device = self.grids_for(height, width), next(self.model.parameters()).device.type
        found: dict[str, list[str | None]] = {}
        for layer in self.layers:
            if layer.spec.is_cross_attention:
                continue
            if layer.processor is None:
                found[layer.spec.name] = [layer.left_alone] * num_phases
                continue
            reasons = [self._reason(layer, grids, phase, device, 0) for phase in range(num_phases)]
            found[layer.spec.name] = [None if reason == ACCELERATED else reason for reason in reasons]
        return found

    @staticmethod
    def _reason(layer: PatchedLayer, grids: Sequence[tuple[int, int]], phase: int, device: str, mask_rows: int) -> str:
        assert layer.processor is not None
        rows, columns = grids[layer.spec.level]
        return layer.processor.reason_exact(phase, (rows, columns), rows * columns, device, mask_rows)


def attention_layers(prefix: str, model: nn.Module, architecture: Architecture) -> list[PatchedLayer]:
    """Every attention layer of a denoiser, named with the prefix; nothing is changed."""
    layers = architecture.layers(uncompiled(model))
    return [PatchedLayer(replace(spec, name=prefix + spec.name), module) for spec, module in layers]
