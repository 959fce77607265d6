"""The handle of a patched model: what was put where, what ran, and the way back.

Everything is built first and swapped in last, so that a failure leaves no trace; removing puts back the very
objects that were there.
"""

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from diffusers import DiffusionPipeline
from torch import nn

from diffattn.architectures import Architecture, architecture_of
from diffattn.architectures.denoisers import uncompiled
from diffattn.architectures.run_state import ACCELERATED, EXACT_HEADS, Latest, RunState, Tally
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import NoiseLevels
from diffattn.patching.hook import DiffAttnWarning, OutsideCompiled, PatchedLayer, RunHook
from diffattn.patching.plan import Plan
from diffattn.patching.report import LayerReport, Report

SHARED = "pipelines made from this one with from_pipe share its denoiser and run patched too"


class Patch:
    """A patched model, made by `diffattn.patch`."""

    def __init__(self, target: DiffusionPipeline | nn.Module, denoisers: Mapping[str, nn.Module], plan: Plan) -> None:
        self.run = RunState(Latest())
        self.tally = Tally()
        self.hooks: list[RunHook] = []
        self._target = weakref.ref(target)
        self._noise_levels = NoiseLevels(getattr(target, "scheduler", None))
        self._num_runs = 0
        self._num_calls = 0
        self._warned = False
        self._removed = False
        self._layers: list[PatchedLayer] = []
        anatomy = {prefix: _layers_of(prefix, model) for prefix, model in denoisers.items()}
        specs = [spec for layers in anatomy.values() for spec, _ in layers]
        plan.check_names([spec.name for spec in specs if not spec.is_cross_attention])
        self.plan = plan.fit(specs)
        self._options = [self.plan.options_at(phase) for phase in range(len(plan.methods))]
        for prefix, model in denoisers.items():
            architecture = architecture_of(uncompiled(model))
            found = [self._build(spec, module, architecture) for spec, module in anatomy[prefix]]
            self.hooks.append(RunHook(self, model, architecture, found))
            self._layers += found
        if not any(layer.processor for layer in self._layers):
            why = Counter(layer.left_alone for layer in self._layers)
            reasons = "; ".join(f"{n} x {r}" for r, n in why.items()) or "it has no attention layer"
            raise ValueError(f"nothing to patch in {self._model_name}: {reasons}")
        self._swap_in()

    @property
    def _model_name(self) -> str:
        return type(uncompiled(self.hooks[0].model)).__name__

    def _build(self, spec: LayerSpec, module: Any, architecture: Architecture) -> PatchedLayer:
        """Everything of one layer, without touching it."""
        layer = PatchedLayer(spec, module)
        if spec.is_cross_attention:
            layer.left_alone = "cross-attention"
        elif reason := architecture.why_unsupported(module):
            layer.left_alone = reason
        elif not self.plan.chooses(spec):
            layer.left_alone = "not among the chosen layers"
        elif reason := self.plan.why_not(spec):
            layer.left_alone = reason
        else:
            layer.processor = architecture.processor(
                layer=spec,
                original=module.processor,
                methods=self.plan.methods_of(spec),
                run=self.run,
                tally=self.tally,
                owner=self,
            )
        return layer

    def _swap_in(self) -> None:
        try:
            for hook in self.hooks:
                _register(hook)
            for layer in self._layers:
                if layer.processor is not None:
                    layer.module.set_processor(layer.processor)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back as it was; what others have put in our place stays. Idempotent."""
        for layer in self._layers:
            if layer.processor is not None:
                layer.processor.active = False
                if layer.module.processor is layer.processor:
                    layer.module.set_processor(layer.processor.original)
        for hook in self.hooks:
            _unregister(hook)
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def report(self) -> Report:
        """What was patched, what ran accelerated, and why the rest did not."""
        self._notice_displaced()
        tokens = {layer.spec.name: hook.tokens(layer.spec) for hook in self.hooks for layer in hook.layers}
        return Report(
            model=self._model_name,
            method=self.plan.method,
            preset=self.plan.preset,
            layers=tuple(self._layer_report(x, tokens.get(x.spec.name)) for x in self._layers),
            runs=self._num_runs,
            calls=self._num_calls,
            removed=self._removed,
            notes=(SHARED,) if isinstance(self._target(), DiffusionPipeline) else (),
        )

    def trace(self) -> list[dict[str, Any]]:
        """What happened in every call of the latest run of the calling thread, as JSON types.

        Each call has "noise_level" (1 noise ... 0 data), "phase" (which entry of the schedule), "options" (of that
        entry, or "exact") and "change" (Δ_k of a `LatentChangeSchedule`, or None): of the batch, or a list with
        one per sample where they differ.
        """
        return copy.deepcopy(list(self.run.trace))

    def last_call(self) -> Mapping[str, Any] | None:
        """The last entry of `trace`, to be read only: it is no copy. None before the first call."""
        return self.run.trace[-1] if self.run.trace else None

    def accelerated(self, layer: str) -> int:
        """Calls of a layer that ran accelerated, as `report` counts them."""
        return self.tally.of(layer).get(ACCELERATED, 0)

    def expect_new_run(self) -> None:
        """The next call in this thread begins a new run, whatever its noise level.

        A rising noise level, or time steps that a scheduler sets anew, begin one anyway. For pipelines whose denoiser
        is given another time than the scheduler's own: a run that was broken off in its first step leaves no trace.
        """
        self.run.schedule = None

    def _layer_report(self, layer: PatchedLayer, tokens: int | None) -> LayerReport:
        counts = self.tally.of(layer.spec.name)
        return LayerReport(
            name=layer.spec.name,
            level=layer.spec.level,
            method="-" if layer.left_alone else self.plan.method_name(layer.spec),
            tokens=tokens,
            accelerated=counts.pop(ACCELERATED, 0),
            exact_heads=counts.pop(EXACT_HEADS, 0),
            passed_through=counts,
            left_alone=layer.left_alone,
            displaced_by=layer.displaced_by,
        )

    # What the hook asks for and tells.

    def noise_levels(self) -> NoiseLevels:
        """Reads time steps as the pipeline's scheduler of this moment means them."""
        scheduler = getattr(self._target(), "scheduler", self._noise_levels.scheduler)
        if scheduler is not self._noise_levels.scheduler:
            self._noise_levels = NoiseLevels(scheduler)
        return self._noise_levels

    def begin_run(self, size: Sequence[int]) -> None:
        """A run on latents of a size begins: count it, and look whether all processors are still in place."""
        self._num_runs += 1
        self.run.trace.clear()
        for hook in self.hooks:
            hook.begin_run(*size)
        if names := self._notice_displaced():
            by = ", ".join(sorted({x.displaced_by for x in self._layers if x.displaced_by}))
            warnings.warn(
                f"{len(names)} patched layers run without diffattn: their processors were replaced by {by} "
                "since patching; unpatch and patch again to accelerate them",
                DiffAttnWarning,
                stacklevel=7,
            )

    def record_call(self, hook: RunHook, noise_levels: Sequence[float], phase: int | tuple[int, ...]) -> None:
        """A call of one denoiser begins; only the main one's are counted and traced, not its ControlNets'."""
        if hook is not self.hooks[0]:
            return
        self._num_calls += 1
        several = isinstance(phase, tuple)
        self.run.trace.append(
            {
                "noise_level": noise_levels[0] if len(noise_levels) == 1 else list(noise_levels),
                "phase": list(phase) if several else phase,
                "options": [self._options[p] for p in phase] if several else self._options[phase],
                "change": getattr(self.run.schedule, "change", None),
            }
        )

    def first_warning(self) -> bool:
        """True once."""
        first, self._warned = not self._warned, True
        return first

    def _notice_displaced(self) -> list[str]:
        """Names of the layers whose processor was replaced since the last look."""
        names = []
        for layer in self._layers:
            if self._removed or layer.processor is None:
                continue
            before, there = layer.displaced_by, layer.module.processor
            layer.displaced_by = None if there is layer.processor else _name_of(there)
            if layer.displaced_by and not before:
                names.append(layer.spec.name)
        return names

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Part of a deep copy of the model: independent of this patch, and at home in the copied pipeline."""
        memo[id(self)] = new = object.__new__(type(self))
        target = self._target()
        for name, value in self.__dict__.items():
            if name not in ("_target", "_noise_levels"):
                setattr(new, name, copy.deepcopy(value, memo))
        new._target = self._target if target is None else weakref.ref(memo.get(id(target), target))
        new._noise_levels = NoiseLevels(getattr(new._target(), "scheduler", self._noise_levels.scheduler))
        return new


def _layers_of(prefix: str, model: nn.Module) -> list[tuple[LayerSpec, nn.Module]]:
    """Every attention layer of a denoiser, named with the prefix."""
    layers = architecture_of(uncompiled(model)).layers(uncompiled(model))
    return [(replace(spec, name=prefix + spec.name), module) for spec, module in layers]


def _name_of(processor: Any) -> str:
    return "the layer's own attention" if processor is None else type(processor).__name__


def _register(hook: RunHook) -> None:
    """Call the hook before every forward; outside the compiled code if `module.compile()` was called."""
    model = hook.model
    if model._compiled_call_impl is not None:
        hook.outside = OutsideCompiled(hook, model._compiled_call_impl)
        model._compiled_call_impl = hook.outside  # type: ignore[assignment]
    model.register_forward_pre_hook(hook, with_kwargs=True)


def _unregister(hook: RunHook) -> None:
    """Undo `_register`. Works on deep copies too, whose hook handles point nowhere."""
    model = hook.model
    for key in [key for key, found in model._forward_pre_hooks.items() if found is hook]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    if hook.outside is not None and model._compiled_call_impl is hook.outside:
        model._compiled_call_impl = hook.outside.compiled
    hook.outside = None
