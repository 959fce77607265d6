"""Follows the runs of a denoiser: called before each forward, outside anything compiled."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.architectures.base import Architecture, Processor
from diffattn.architectures.denoisers import uncompiled
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall
from diffattn.methods.base import LayerSpec

_outside_compiled: Any = torch.compiler.disable


class DiffAttnWarning(UserWarning):
    """Something about a patched model is not as its user would expect."""


@dataclass
class PatchedLayer:
    """One attention layer of a denoiser, patched or left alone."""

    spec: LayerSpec
    module: Any  # has set_processor and processor
    processor: Processor | None = None  # ours
    left_alone: str | None = None  # why there is none of ours
    displaced_by: str | None = None  # class of what took our place


class RunHook:
    """The forward pre-hook of one denoiser: reads the noise level, sets the phase, counts for compiled code."""

    def __init__(
        self, patch: Any, model: nn.Module, architecture: Architecture, layers: Sequence[PatchedLayer]
    ) -> None:
        self.patch = patch
        self.model = model
        self.architecture = architecture
        self.layers = [layer for layer in layers if layer.processor is not None]
        self.grids: list[tuple[int, int]] = []  # by level, of the last call
        self.compiled = False  # part of the denoiser is compiled
        self.outside: OutsideCompiled | None = None
        self._names = list(inspect.signature(type(uncompiled(model)).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Registered with `register_forward_pre_hook(..., with_kwargs=True)`."""
        if self.outside is not None and module._compiled_call_impl is self.outside:
            return  # called before, and now traced
        self.begin_call(args, kwargs, torch.compiler.is_compiling())

    @_outside_compiled
    def begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: bool = False) -> None:
        """One call of the denoiser is about to happen; `traced`: from inside a compiled caller."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        sample: Tensor = given[self.architecture.sample_name]
        time = given[self.architecture.time_name]
        mask_rows = int(given.get("attention_mask") is not None)
        run, device = self.patch.run, sample.device.type
        grids = self.set_size(*sample.shape[-2:])
        levels, to_come, scheduler_run = self.architecture.read_time(
            uncompiled(self.model), time, self.patch.noise_levels()
        )
        new_run = max(levels) > run.last_level or scheduler_run != run.scheduler_run
        if run.schedule is None or new_run:
            run.schedule = copy.deepcopy(self.patch.plan.schedule)
            run.schedule.start(sample.shape[0])
            self.patch.begin_run(sample.shape[-2:])
            self._check_reachable(run.schedule.reachable(to_come), device, mask_rows)
        run.last_level, run.scheduler_run = max(levels), scheduler_run
        run.schedule.observe(sample, levels)
        phase, compiled = run.schedule.phase(), traced or self.compiled
        run.begin(DenoiserCall(phase, {h * w: (h, w) for h, w in grids}, compiled))
        self.patch.record_call(self, levels, phase)
        if compiled:
            self._count(phase, device, mask_rows)

    def set_size(self, height: int, width: int) -> list[tuple[int, int]]:
        """Latents of this size are coming; their grids by level."""
        self.grids = grids = self.architecture.grids(uncompiled(self.model), height, width)
        return grids

    def begin_run(self, height: int, width: int) -> None:
        """A run on latents of this size begins, perhaps with another denoiser of the same patch."""
        self.set_size(height, width)
        self.compiled = uncompiled(self.model) is not self.model or any(
            m._compiled_call_impl is not None for m in self.model.modules()
        )

    def tokens(self, layer: LayerSpec) -> int | None:
        """Image tokens of a layer at the size of the last call."""
        if not self.grids:
            return None
        rows, columns = self.grids[layer.level]
        return rows * columns

    def _reasons(self, phase: int, device: str, mask_rows: int) -> list[tuple[str, str]]:
        """(layer, why exact) in one phase."""
        grids = {h * w for h, w in self.grids}
        return [
            (
                layer.spec.name,
                layer.processor.why_exact(phase, grids, self.tokens(layer.spec) or 0, device, mask_rows),
            )
            for layer in self.layers
            if layer.processor is not None and layer.displaced_by is None
        ]

    def _count(self, phase: int | tuple[int, ...], device: str, mask_rows: int) -> None:
        for p in sorted({phase} if isinstance(phase, int) else set(phase)):
            for name, reason in self._reasons(p, device, mask_rows):
                self.patch.tally.add(name, reason)

    def _check_reachable(self, phases: set[int], device: str, mask_rows: int) -> None:
        """A run in which nothing can be accelerated: an error if an option of the user rules it out, else a warning."""
        hooks: list[RunHook] = self.patch.hooks
        reasons = [r for h in hooks for p in sorted(phases) for _, r in h._reasons(p, device, mask_rows)]
        if not reasons or ACCELERATED in reasons:
            return
        largest = max(h.tokens(layer.spec) or 0 for h in hooks for layer in h.layers)
        self.patch.plan.check_size(largest)
        if self.patch.first_warning():
            why = "; ".join(dict.fromkeys(reasons))
            warnings.warn(f"diffattn accelerates no layer in this run: {why}", DiffAttnWarning, stacklevel=6)


class OutsideCompiled:
    """Stands in for the `_compiled_call_impl` that `module.compile()` leaves, to run the hook outside of it."""

    def __init__(self, hook: RunHook, compiled: Any) -> None:
        self.hook = hook
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.hook.begin_call(args, kwargs)
        return self.compiled(*args, **kwargs)
