"""The handle of a patched model: what was replaced, what ran, and how to undo it.

Everything is built first and swapped in last, so that a failure leaves no trace; removing restores the very same
objects.
"""

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Self

from torch import nn

from diffattn.architectures import Architecture, architecture_of
from diffattn.architectures.base import Size
from diffattn.architectures.decisions import read_given
from diffattn.architectures.denoisers import Pipeline, draws, uncompiled, uncovered_networks
from diffattn.architectures.plain_attention import install
from diffattn.architectures.run_state import ACCELERATED, HEADS, NotPickled
from diffattn.machine import execution_device
from diffattn.patching.decision_cache import cache_for
from diffattn.patching.denoiser import PatchedDenoiser, PatchedLayer, attention_layers, runs_of
from diffattn.patching.hook import RunHook, hooks_of
from diffattn.patching.plan import Plan
from diffattn.patching.report import LayerReport, Report
from diffattn.patching.run import Runs
from diffattn.patching.target import Target

SHARED = "pipelines made from this one with from_pipe share its denoiser and are patched too"
REPLACED = "the pipeline draws with another {} since, which is not patched: unpatch it, and patch it again"
ELSEWHERE = "{} belongs to the patch of another pipeline, and is left to it"

CHANGING = threading.RLock()
"""Held while a model is patched or restored, so that two threads do not patch the same one."""


class Patch(NotPickled):
    """A patched model, made by `diffattn.patch`."""

    def __init__(
        self,
        target: Pipeline | nn.Module,
        denoisers: Mapping[str, nn.Module],
        plan: Plan,
        calibrate: bool | str | Path | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Patch denoisers that are not patched yet.

        Args:
            target: a pipeline or a denoiser.
            denoisers: of the target, see `denoisers_of`.
            plan: what to do.
            calibrate: as in `diffattn.patch`.
            left_out: names of the target's networks that are left to another patch.

        Raises:
            ValueError: an option or a layer that the model does not allow; no layer to patch; a damaged cache of
                decisions.
        """
        self._target = Target(target)
        self._notes = [*uncovered_networks(target), *(ELSEWHERE.format(name) for name in left_out)]
        self._removed = False
        architectures = {prefix: architecture_of(uncompiled(model)) for prefix, model in denoisers.items()}
        layers = {prefix: attention_layers(prefix, model, architectures[prefix]) for prefix, model in denoisers.items()}
        specs = [layer.spec for found in layers.values() for layer in found]
        plan.check_names([spec.name for spec in specs if not spec.is_cross_attention])
        self.plan = plan.fit(specs)
        self._runs = Runs(self.plan, self._target, cache_for(calibrate))
        for prefix, model in denoisers.items():
            for layer in layers[prefix]:
                self._build(layer, architectures[prefix])
            denoiser = PatchedDenoiser(model, architectures[prefix], layers[prefix], draws=draws(prefix))
            self._runs.denoisers.append(denoiser)
        self._hooks = [RunHook(self, self._runs, denoiser) for denoiser in self._runs.denoisers]
        if not any(layer.runs for layer in self._layers):
            why = Counter(layer.reason for layer in self._layers if not layer.spec.is_cross_attention)
            reasons = "; ".join(f"{n} x {r}" for r, n in why.items()) or "it has no self-attention layer"
            raise ValueError(f"nothing to patch in {self._model_name}: {reasons}")
        self._runs.look_up(execution_device(self._runs.denoisers[0].model))
        self._swap_in()

    @property
    def _layers(self) -> list[PatchedLayer]:
        return [layer for denoiser in self._runs.denoisers for layer in denoiser.layers]

    @property
    def _model_name(self) -> str:
        return type(uncompiled(self._runs.denoisers[0].model)).__name__

    def _build(self, layer: PatchedLayer, architecture: Architecture) -> None:
        """Build everything that one layer needs, without changing the layer."""
        spec = layer.spec
        if spec.is_cross_attention:
            layer.reason = "cross-attention"
        else:
            layer.reason = spec.exact or architecture.reason_exact(layer.module) or self.plan.reason_exact(spec)
        if layer.reason is None:
            layer.runs, layer.processor = architecture.replaced(
                layer=spec,
                original=layer.module.processor,
                methods=self.plan.methods_of(spec),
                run=self._runs.state,
                tally=self._runs.tally,
                owner=self,
                decisions=self._runs.decisions,
            )

    def _swap_in(self) -> None:
        try:
            for hook in self._hooks:
                hook.register()
            for layer in self._layers:
                if layer.runs is not None:
                    install(layer.module, layer.processor)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore everything except processors that others have replaced since. Idempotent."""
        with CHANGING:
            for layer in self._layers:
                if layer.runs is not None:
                    ours = layer.module.processor
                    is_ours = layer.is_ours(ours)
                    for runs in layer.all_runs:
                        runs.active = False
                    if is_ours:
                        install(layer.module, runs_of(ours).original)  # type: ignore[union-attr]
            for hook in self._hooks:
                hook.unregister()
            self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def subject(self) -> Any:
        """What was patched, a pipeline or a denoiser; None if it is gone."""
        return self._target.subject

    def report(self) -> Report:
        """What was patched, what ran accelerated, and why the rest did not."""
        if not self._removed:
            self._runs.displaced()
        tokens = {x.spec.name: d.tokens(x.spec) for d in self._runs.denoisers for x in d.patched}
        shared = (SHARED,) if self._target.is_pipeline else ()
        other = None if self._removed else self._target.replaced(self._runs.denoisers[0].model)
        unpatched = other if other is not None and not hooks_of(other) else None
        replaced = () if unpatched is None else (REPLACED.format(type(uncompiled(unpatched)).__name__),)
        return Report(
            model=self._model_name,
            method=self.plan.method,
            preset=self.plan.preset,
            layers=tuple(self._layer_report(x, tokens.get(x.spec.name)) for x in self._layers),
            runs=self._runs.num_runs,
            calls=self._runs.num_calls,
            removed=self._removed,
            notes=(*replaced, *self._notes, *shared),
        )

    def explain(
        self, height: int, width: int, frames: int | None = None, *, batch: int | None = None
    ) -> Mapping[str, list[str | None]]:
        """Report what would run exact, without running anything.

        Args:
            height, width: of the latents.
            frames: of a video's latents.
            batch: samples in a call, to use what was timed at that size; None: use the package's guess.

        Returns:
            Every self-attention layer -> why it runs exact in each phase of the schedule, None where it is
            accelerated.
        """
        found: dict[str, list[str | None]] = {}
        for denoiser in self._runs.denoisers:
            found |= denoiser.explain(Size(height, width, frames), len(self.plan.methods), batch)
        return found

    def out_of_range(self, height: int, width: int) -> str | None:
        """What is wrong with an option that leaves nothing to accelerate on latents of this size, or None."""
        size = Size(height, width)
        grids = [d.grids_for(size)[layer.spec.level] for d in self._runs.denoisers for layer in d.patched]
        return self.plan.out_of_range(max(map(prod, grids)))

    def trace(self) -> list[dict[str, Any]]:
        """Every call of the calling thread's latest run, as JSON types.

        Each call has "noise_level" (1 noise ... 0 data, None if unknown), "phase" (which entry of the
        schedule, None where that needs the noise level), "options" (of that entry, or "exact") and "change" (Δ_k of a
        `LatentChangeSchedule`, or None): of the batch, or a list with one per sample where they differ.
        """
        return copy.deepcopy(list(self._runs.state.trace))

    def last_call(self) -> Mapping[str, Any] | None:
        """The last entry of `trace`; not a copy, so do not modify it. None before the first call."""
        trace = self._runs.state.trace
        return trace[-1] if trace else None

    def accelerated(self, layer: str) -> int:
        """Accelerated calls of a layer, as counted by `report`."""
        return self._runs.tally.of(layer).get(ACCELERATED, 0)

    def decisions(self) -> dict[str, bool | float]:
        """What was decided about every kind of call so far that speed decides.

        Kind of call -> False: exact attention is faster. A number: the method is, and remains so while at most this
        share of the heads runs exact beside it, because of `max_head_error`; with more, the whole call runs exact.
        True: the method is assumed to be faster, since nothing was timed.

        Passed as `decisions`, they make `diffattn.patch` do the same again, whatever is faster then.
        """
        return {kind: found.choice for kind, found in self._runs.decisions.used().items()}

    def follow(self, decisions: Mapping[str, bool | float]) -> None:
        """From the next run on, follow these decisions; see `decisions`.

        Raises:
            ValueError: not a mapping from kinds of calls to true, false or a number above 0 and at most 1.
        """
        self._runs.decisions.replace(read_given(decisions))

    def begin_run(self, *args: Any, **kwargs: Any) -> None:
        """Begin a run as if the denoiser were called with these arguments, without calling it.

        This does the once-per-run work; later calls at this noise level or below belong to the run.
        """
        self.expect_new_run()
        self._hooks[0].begin_call(args, kwargs)
        self._runs.end_call()

    def expect_new_run(self) -> None:
        """Make the next call in this thread begin a new run, whatever its noise level.

        A rising noise level, or new time steps in the scheduler, begin a run anyway. Needed for pipelines that pass the
        denoiser another time than the scheduler's own, where a run aborted in its first step goes unnoticed.
        """
        self._runs.state.schedule = None

    def quiet(self) -> None:
        """Stop warning about runs in which nothing is accelerated."""
        self._runs.quiet()

    def _layer_report(self, layer: PatchedLayer, tokens: int | None) -> LayerReport:
        counts = self._runs.tally.of(layer.spec.name)
        return LayerReport(
            name=layer.spec.name,
            level=layer.spec.level,
            method="-" if layer.reason else self.plan.method_name(layer.spec),
            tokens=tokens,
            accelerated=counts.pop(ACCELERATED, 0),
            exact_heads=counts.pop(HEADS, 0),
            timed={kind: str(found) for kind, found in self._runs.decisions.used_by(layer.spec.name).items()},
            passed_through=counts,
            left_alone=layer.reason,
            displaced_by=layer.displaced_by,
        )
