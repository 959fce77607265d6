"""Follows the runs of a patched model and derives the phase of its layers from each call's arguments."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from diffattn.architectures.base import Size
from diffattn.architectures.decisions import Decision, Decisions
from diffattn.architectures.layer_plug import LayerPlug
from diffattn.architectures.run_state import (
    ACCELERATED,
    EXACT_PHASE,
    HEADS,
    DenoiserCall,
    Latest,
    NotPickled,
    RunState,
    Tally,
)
from diffattn.methods.base import EXACT_SHARE
from diffattn.noise_level import Reading
from diffattn.patching.callers import is_called, is_kept_by_caller, stacklevel
from diffattn.patching.decision_cache import DecisionCache
from diffattn.patching.denoiser import Expected, PatchedDenoiser, PatchedLayer
from diffattn.patching.hook import DiffAttnWarning
from diffattn.patching.plan import Plan
from diffattn.patching.scheduler import SchedulerInUse
from diffattn.patching.target import Target
from diffattn.schedules import EXACT, needs_level

MOST_EXACT = 0.5
"""A layer in which a larger share of the heads runs exact hardly gains anything."""


class Runs(NotPickled):
    """Every run of one patched model.

    For every call of a denoiser, its hook calls `begin_call`, which reads the noise level, begins a run if needed,
    asks the schedule for the phase, and leaves a `DenoiserCall` in `state` for the processors; and then `end_call`.

    Attributes:
        plan: which options apply in which phase.
        state: the current run, one per thread.
        tally: calls of all runs by layer and reason.
        denoisers: the main one first.
        num_runs, num_calls: started so far, of the main denoiser.
    """

    def __init__(self, plan: Plan, target: Target, cache: DecisionCache | None = None) -> None:
        """`cache`: where to look up and store what is faster; None: nothing is timed."""
        self.plan = plan
        self.cache = cache
        self.decisions = Decisions(plan.decisions, measures=cache is not None)
        self._looked_up: set[str] = set()
        self.state = RunState(Latest())
        self.tally = Tally()
        self.denoisers: list[PatchedDenoiser] = []
        self.num_runs = 0
        self.num_calls = 0
        self._target = target
        self._options = [plan.options_at(phase) for phase in range(len(plan.methods))]
        self._needs_level = needs_level(plan.schedule)
        self._warned: set[str] = set()

    def begin_call(
        self, denoiser: PatchedDenoiser, sample: Tensor, time: Any, *, size: Size, mask_rows: int, traced: bool
    ) -> bool:
        """See `hook.Listener`."""
        self.look_up(sample.device)
        state, expected = self.state, _expected(sample, mask_rows)
        grids = denoiser.set_size(size)  # of this call: the denoiser may serve another thread in between
        scheduler = SchedulerInUse(state, self.denoisers[0].model, self._target.scheduler)
        reading = denoiser.read_time(time, scheduler)
        begins = state.schedule is None or state.is_left_by(reading)
        if begins:
            self._begin_run(sample, size, reading, expected)
        place = -1 if reading.run is None else 0 if begins else state.place_after(max(reading.levels))
        state.follow(reading, begins)
        assert state.schedule is not None
        state.schedule.observe(sample, reading.levels)
        phase = state.schedule.phase() if self._is_enough(reading) else EXACT_PHASE
        compiled = traced or denoiser.compiled
        looks = not traced and denoiser.should_look(phase, place)
        state.begin(
            DenoiserCall(
                phase, grids, compiled, size.references, context_first=size.context_first, same_mask=size.same_mask,
                contexts=size.contexts, exact=size.exact, place=place, looks=looks,
            )
        )  # fmt: skip
        self._count_displaced(denoiser)
        if looks:
            state.expected = expected
        elif compiled:
            self._count(denoiser, phase, expected)
        if denoiser.draws:
            self.num_calls += 1
            state.trace.append(self._entry(reading, phase))
        return looks

    def end_look(self, denoiser: PatchedDenoiser) -> None:
        """See `hook.Listener`."""
        state = self.state
        assert state.call is not None
        denoiser.end_look(state.call, state.expected)
        state.begin(replace(state.call, looks=False))
        self._count(denoiser, state.call.phase, state.expected)

    def end_call(self) -> None:
        """See `hook.Listener`."""
        self.state.inside = False
        if self.state.unchecked is not None:
            self._check_reachable()
        if self.state.call is None or not self.state.call.looks:  # else it failed while heads were looked for
            self._check_heads()
        if self.decisions.any_new and self.cache is not None:
            for device, found in self.decisions.take_new().items():
                self._keep(self.cache, torch.device(device), found)

    def _check_heads(self) -> None:
        """Warn about a run in which hardly any head of any layer can be accelerated."""
        shares = [kept[EXACT_SHARE] for kept in self.state.memory.values() if EXACT_SHARE in kept]
        if shares and min(shares) > MOST_EXACT:
            self._warn_once(
                "heads",
                f"{fmean(shares):.0%} of the heads run exact, because diffattn would change their output by more than "
                "max_head_error: little or nothing is gained. A higher max_head_error, such as that of the preset "
                "'fast', accelerates more of them and changes the picture more",
            )

    def look_up(self, device: torch.device) -> None:
        """Load what is known about a device.

        Raises:
            ValueError: the cache is damaged.
        """
        if self.cache is not None and str(device) not in self._looked_up:
            self._looked_up.add(str(device))
            self.decisions.add_known(self.cache.read(device))

    def _keep(self, cache: DecisionCache, device: torch.device, found: Mapping[str, Decision]) -> None:
        try:
            cache.add(device, found)
        except (OSError, ValueError) as error:
            self._warn_once("cache", f"what is faster here could not be stored for later runs: {error}")

    def enter_forward(self, denoiser: PatchedDenoiser) -> None:
        """See `hook.Listener`."""
        if self.state.inside and (denoiser.compiled or is_called(denoiser.model)):
            return  # else Ctrl+C ended the last call before it could say so
        self.state.bypassed = True
        name = type(denoiser.model).__name__
        self._warn_once(
            "bypassed",
            f"{name}.forward was called directly, which skips the hooks of diffattn: its layers run exact; call the "
            "model itself, model(...), to accelerate it",
        )

    def quiet(self) -> None:
        """Stop warning about runs in which nothing is accelerated."""
        self._warned.add("nothing")

    def displaced(self) -> list[PatchedLayer]:
        """The layers whose processor was replaced, and is not ours at present."""
        return [layer for denoiser in self.denoisers for layer in denoiser.patched if layer.look()]

    def _is_enough(self, reading: Reading) -> bool:
        """Whether the known noise level is enough for the schedule."""
        return reading.known or not self._needs_level

    def _begin_run(self, sample: Tensor, size: Size, reading: Reading, expected: Expected) -> None:
        """Count the run, and warn about anything its user would not expect."""
        state = self.state
        state.schedule = copy.deepcopy(self.plan.schedule)
        state.schedule.start(sample.shape[0])
        state.forget()
        self.num_runs += 1
        for denoiser in self.denoisers:
            denoiser.begin_run(size)
        self._renew_displaced()
        self._look_for_displaced()
        if not self._is_enough(reading):
            self._warn_once(
                "level",
                "the schedule needs the noise level, which cannot be read from this time step, because the scheduler "
                "that made it is not known; such calls run exact. Draw with a pipeline, or pass the denoiser the "
                "unchanged time steps of a diffusers scheduler",
            )
        else:
            state.unchecked = sorted(state.schedule.reachable(reading.to_come)), expected
            if not self.decisions.measures:  # else once the first call has shown what is faster
                self._check_reachable()

    def _check_reachable(self) -> None:
        """Warn about a run without any acceleration; it is drawn exactly, even if an option of the user causes it."""
        assert self.state.unchecked is not None
        (phases, expected), self.state.unchecked = self.state.unchecked, None
        reasons = [r for d in self.denoisers for p in phases for _, r in d.reasons(p, expected)]
        if not reasons or ACCELERATED in reasons:
            return
        largest = max(d.tokens(layer.spec) or 0 for d in self.denoisers for layer in d.patched)
        why = self.plan.out_of_range(largest) or "; ".join(dict.fromkeys(reasons))
        self._warn_once("nothing", f"diffattn accelerates no layer in this run: {why}")

    def _renew_displaced(self) -> None:
        """Install the method in processors that diffusers or the user put in place of ours."""
        for denoiser in self.denoisers:
            for layer in denoiser.patched:
                before, there = layer.runs, layer.module.processor
                if not isinstance(before, LayerPlug) or not layer.look() or layer.is_ours(there):
                    continue
                if denoiser.architecture.reason_exact(layer.module) is None:
                    parts = {name: getattr(before, name) for name in ("layer", "methods", "run", "tally", "owner")}
                    decisions = before.faster.decisions
                    layer.renew(denoiser.architecture.replaced(original=there, decisions=decisions, **parts))
                    assert layer.runs is not None
                    layer.runs.fixed_heads = before.fixed_heads

    def _look_for_displaced(self) -> None:
        """Warn about layers that run without diffattn, with advice where possible."""
        layers = self.displaced()
        news = [layer for layer in layers if not layer.is_reported]
        if not news:
            return
        for layer in news:
            layer.is_reported = True
        by = ", ".join(sorted({layer.displaced_by for layer in layers if layer.displaced_by}))
        many = f"{len(news)} patched layers run" if len(news) > 1 else "1 patched layer runs"
        if all(is_kept_by_caller(layer.processor) for layer in layers):
            self._warn_once(
                f"swapped by {by}",
                f"{many} exact: the pipeline installs {by} there in each call and restores the layer's own processor "
                "afterwards (as perturbed-attention and self-attention guidance do); the report counts these calls, "
                "and all other layers are accelerated",
            )
            return
        self._warn(
            f"{many} without diffattn: their processors were replaced by {by} since patching; unpatch and patch again "
            "to accelerate them, if that is a processor that diffattn can replace"
        )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._warn(message)

    def _warn(self, message: str) -> None:
        warnings.warn(message, DiffAttnWarning, stacklevel=stacklevel())

    def _count_displaced(self, denoiser: PatchedDenoiser) -> None:
        for layer in denoiser.patched:
            if by := layer.look():
                self.tally.add(layer.spec.name, f"replaced by {by} during the call")

    def _count(self, denoiser: PatchedDenoiser, phase: int | tuple[int, ...], expected: Expected) -> None:
        """Count what the processors inside compiled code cannot."""
        for p in sorted({phase} if isinstance(phase, int) else set(phase)):
            for name, reason in denoiser.reasons(p, expected):
                self.tally.add(name, reason)
            for layer in denoiser.patched:
                heads = layer.runs.fixed_heads.get(p, ()) if layer.runs is not None else ()
                if 0 < len(heads) < layer.spec.num_heads:
                    self.tally.add(layer.spec.name, HEADS, len(heads) * (expected.batch or 1))

    def _entry(self, reading: Reading, phase: int | tuple[int, ...]) -> dict[str, Any]:
        """One entry of `Patch.trace`."""
        several = isinstance(phase, tuple)
        levels = reading.levels if len(reading.levels) > 1 else reading.levels[0]
        options = [self._options[p] for p in phase] if several else EXACT if phase < 0 else self._options[phase]
        return {
            "noise_level": levels if reading.known else None,
            "phase": list(phase) if several else None if phase < 0 else phase,
            "options": options,
            "change": getattr(self.state.schedule, "change", None),
        }


def _expected(sample: Tensor, mask_rows: int) -> Expected:
    """What the latents of a call say about its attention, whose precision under autocast may not be theirs."""
    device, dtypes = sample.device.type, (sample.dtype,)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes = (torch.get_autocast_dtype(device), *dtypes)
    return Expected(device, mask_rows, sample.shape[0], dtypes)
