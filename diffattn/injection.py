"""patch and unpatch: the only file that changes someone else's model.

Everything is built first and swapped in last, so that a failure leaves no trace; removing puts back the very
objects that were there.
"""

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from diffusers import ControlNetModel, DiffusionPipeline
from torch import nn

from diffattn.methods.base import LayerSpec
from diffattn.noise_level import NoiseLevels
from diffattn.plan import LayerFilter, Plan
from diffattn.processors import Architecture, architecture_of
from diffattn.processors.base import ACCELERATED, Latest, RunState, Tally
from diffattn.report import LayerReport, Report
from diffattn.run_hook import DiffAttnWarning, OutsideCompiled, PatchedLayer, RunHook, uncompiled
from diffattn.schedules import Schedule

SHARED = "pipelines made from this one with from_pipe share its denoiser and run patched too"


def patch(
    pipe_or_model: DiffusionPipeline | nn.Module,
    method: str = "agent",
    *,
    preset: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    layers: LayerFilter | None = None,
    schedule: Schedule | Mapping[float, Any] | None = None,
    **options: Any,
) -> "Patch":
    """Make a diffusers pipeline, or its denoiser, use another attention.

    Undone by `patch.remove()`, by `unpatch`, or at the end of a `with` block. A pipeline made with `from_pipe`
    shares the denoiser and so the patch. Compile first, then patch.

    Args:
        pipe_or_model: a pipeline with a supported denoiser (its ControlNets are patched with it), or a denoiser.
        method: a name in `diffattn.METHODS`.
        preset: a named set of options; "balanced" if neither `preset`, `recipe` nor `schedule` is given.
        recipe: a mapping, or the path of a JSON file, with any of method, preset, options, layers, schedule.
            What is given beside it wins, the method excepted.
        layers: names of layers (as in the report), or a predicate on `LayerSpec`; default all that are supported.
        schedule: options by noise level (1 noise ... 0 data), as a `Schedule` or the mapping of `NoiseSchedule`.
        **options: fields of the method's configuration; they win over the preset's.

    Returns:
        The handle: `report()`, `remove()`, and a context manager.

    Raises:
        TypeError: the architecture is not supported.
        ValueError: unknown method, preset, option or layer; an option out of range; no layer to patch; a model
            that is patched already.
    """
    plan = Plan.read(method, preset, recipe, layers, schedule, options)
    denoisers = _denoisers(pipe_or_model)
    for model in denoisers.values():
        if _patches_of(model):
            raise ValueError(
                f"this {type(uncompiled(model)).__name__} is patched already, perhaps through a pipeline that "
                "shares it; call diffattn.unpatch first"
            )
    return Patch(pipe_or_model, denoisers, plan)


def unpatch(pipe_or_model: DiffusionPipeline | nn.Module) -> None:
    """Remove the patch of a pipeline or denoiser, if it has one.

    Raises:
        TypeError: the architecture is not supported.
    """
    for model in _denoisers(pipe_or_model).values():
        for found in _patches_of(model):
            found.remove()


class Patch:
    """A patched model, made by `patch`."""

    def __init__(self, target: DiffusionPipeline | nn.Module, denoisers: Mapping[str, nn.Module], plan: Plan) -> None:
        self.plan = plan
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
        for prefix, model in denoisers.items():
            architecture = architecture_of(uncompiled(model))
            found = [
                self._build(replace(spec, name=prefix + spec.name), module, architecture)
                for spec, module in architecture.layers(uncompiled(model))
            ]
            self.hooks.append(RunHook(self, model, architecture, found))
            self._layers += found
        plan.check_names([x.spec.name for x in self._layers if not x.spec.is_cross_attention])
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
        elif not self.plan.covers(spec):
            layer.left_alone = f"level {spec.level} is not covered with these options"
        else:
            methods = [m if m is not None and m.supports(spec) else None for m in self.plan.methods]
            layer.processor = architecture.processor(
                layer=spec,
                original=module.processor,
                methods=methods,
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

    def _layer_report(self, layer: PatchedLayer, tokens: int | None) -> LayerReport:
        counts = self.tally.of(layer.spec.name)
        return LayerReport(
            name=layer.spec.name,
            level=layer.spec.level,
            method="-" if layer.left_alone else self.plan.method,
            tokens=tokens,
            accelerated=counts.pop(ACCELERATED, 0),
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

    def count_call(self, hook: RunHook) -> None:
        """A call of one denoiser begins; only the main one's are counted, not its ControlNets'."""
        self._num_calls += hook is self.hooks[0]

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
            layer.displaced_by = None if there is layer.processor else type(there).__name__
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


def _denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Prefix of layer names -> denoiser; the main one comes first, without a prefix.

    Raises:
        TypeError: neither a pipeline with a supported denoiser nor a supported denoiser.
    """
    if isinstance(pipe_or_model, nn.Module):
        architecture_of(uncompiled(pipe_or_model))
        return {"": pipe_or_model}
    if not isinstance(pipe_or_model, DiffusionPipeline):
        raise TypeError(f"expected a diffusers pipeline or its denoiser, got {type(pipe_or_model).__name__}")
    main = getattr(pipe_or_model, "unet", None) or getattr(pipe_or_model, "transformer", None)
    if not isinstance(main, nn.Module):
        raise TypeError(f"{type(pipe_or_model).__name__} has no denoiser (unet or transformer)")
    architecture_of(uncompiled(main))
    found = {"": main}
    control = getattr(pipe_or_model, "controlnet", None)
    nets = getattr(control, "nets", [control])  # MultiControlNetModel has several
    for i, net in enumerate(nets):
        if isinstance(net, nn.Module) and isinstance(uncompiled(net), ControlNetModel):
            found["controlnet." if len(nets) == 1 else f"controlnet.{i}."] = net
    return found


def _patches_of(model: nn.Module) -> list[Patch]:
    """The patches a denoiser carries, found by their hooks and processors."""
    inner = uncompiled(model)
    owners = [h.patch for m in (model, inner) for h in m._forward_pre_hooks.values() if isinstance(h, RunHook)]
    for module in inner.modules():
        processor = getattr(module, "processor", None)
        if isinstance(owner := getattr(processor, "owner", None), Patch) and processor.active:  # type: ignore[union-attr]
            owners.append(owner)
    return list({id(owner): owner for owner in owners}.values())


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
