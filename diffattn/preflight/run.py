"""The preflight: what self-attention costs a pipeline on this machine, layer by layer, and whether patching pays off.

Nothing is left behind: hooks and patch exist only during the calls that need them.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from diffattn.architectures import architecture_of
from diffattn.architectures.denoisers import (
    Pipeline,
    denoisers_of,
    is_compiled,
    self_attention_layers,
    uncompiled,
)
from diffattn.drawing.sizes import check_size, pixels_per_latent
from diffattn.machine import describe_machine, dtype_name, execution_device
from diffattn.measure.denoiser_inputs import NOISE_LEVEL, Inputs, make_denoiser_inputs
from diffattn.measure.interleave import Spread, Timings, interleave
from diffattn.measure.layer_times import Gflops, LayerSeconds, LayerTimer, count_layer_gflops
from diffattn.measure.memory import peak_mib
from diffattn.patching.default_method import default_method
from diffattn.patching.hook import DiffAttnWarning
from diffattn.patching.patch import Patch, find_patch, patch
from diffattn.patching.plan import DEFAULT_PRESET, Plan
from diffattn.preflight.result import LayerTime, Phase, Preflight, shares
from diffattn.schedules import NoiseSchedule

__all__ = ["Preflight", "PreflightRun", "preflight"]

PLAIN, TIMED, PATCHED = "plain", "timed", "patched"
WARMUP = 1

OneCall = Mapping[str, LayerSeconds]
"""Layer -> seconds in one call."""


def preflight(
    pipe_or_model: Pipeline | nn.Module,
    height: int | None = None,
    width: int | None = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    batch: int = 2,
    rounds: int = 5,
    time_budget: float | None = None,
    inputs: Inputs | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> Preflight:
    """Time one denoiser call near the beginning of a run, and its self-attention; see `Preflight` for the results.

    Three kinds of calls take turns, round after round, after a warm-up: as the denoiser is; with hooks around its
    self-attention; and patched. It runs on its own device, if it is offloaded on the one that a call moves it to, and
    in its own dtype, and is left unchanged. The ControlNets of a pipeline are not run.

    Args:
        pipe_or_model: a pipeline with a supported denoiser, or a denoiser; neither patched nor compiled.
        height, width: of the picture in pixels; of the latents for a denoiser without a pipeline. None: its own.
        method, preset: what patching would use, see `diffattn.patch`; method None: the one that suits the model;
            preset None: "balanced".
        batch: samples in a call; 2 is one picture with guidance.
        rounds: how often each kind of call is timed.
        time_budget: seconds; apart from the first, no round starts that would end later.
        inputs: (args, kwargs) of the denoiser call, if its conditions are unusual; latents of the given size.
        on_round: called after every round.

    Raises:
        TypeError: the architecture is not supported.
        ValueError: a size the model cannot take; no self-attention that the method can patch; unknown method or
            preset; a patched or compiled denoiser; a number out of range; conditions that need `inputs`.
    """
    run = PreflightRun(
        pipe_or_model, height, width, method=method, preset=preset, batch=batch, rounds=rounds, inputs=inputs
    )
    return run(time_budget=time_budget, on_round=on_round)


class PreflightRun:
    """A preflight, checked and ready to run; `preflight` documents arguments and errors."""

    def __init__(
        self,
        pipe_or_model: Pipeline | nn.Module,
        height: int | None = None,
        width: int | None = None,
        *,
        method: str | None = None,
        preset: str | None = None,
        batch: int = 2,
        rounds: int = 5,
        inputs: Inputs | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.target, self.batch, self.rounds = pipe_or_model, batch, rounds
        self.model = _plain(pipe_or_model)
        self.preset = preset or DEFAULT_PRESET
        self.method = method or default_method(self.model)
        self.device = execution_device(self.model)
        self.decisions: Mapping[str, bool | float] = {}
        self.height, self.width, latents = _size(pipe_or_model, self.model, height, width)
        self.latents = latents
        grids = [prod(grid) for grid in architecture_of(self.model).grids(self.model, *latents)]
        found = self_attention_layers(self.model)
        self.modules = {spec.name: module for spec, module in found}
        self.specs = {spec.name: spec for spec, _ in found}
        self.tokens = {spec.name: grids[spec.level] for spec, _ in found}
        with patch(pipe_or_model, self.method, preset=self.preset) as handle:  # raises if there is nothing to patch
            plan, explained = handle.plan, handle.explain(*latents)
        by_phase = {name: explained[name] for name in self.specs}
        self.reasons = {name: of_phases[_phase_at_start(plan)] for name, of_phases in by_phase.items()}
        self.phases = _phases(plan, by_phase.values())
        self.inputs = inputs or make_denoiser_inputs(self.model, *latents, batch)

    def __call__(self, *, time_budget: float | None = None, on_round: Callable[[], None] = lambda: None) -> Preflight:
        """Measure; arguments as in `preflight`."""
        args, kwargs = self.inputs
        deadline = None if time_budget is None else time.monotonic() + time_budget
        gflops = count_layer_gflops(self.model, list(self.modules), args, kwargs)
        timer = LayerTimer(self.modules, self.device)
        call = partial(self.model, *args, **kwargs)
        with torch.no_grad():
            self._decide(call)
            kinds = [PLAIN, TIMED, *([PATCHED] if None in self.reasons.values() else [])]
            peak = peak_mib(call, self.device)
            timings = interleave(
                dict.fromkeys(kinds, call), self.rounds, WARMUP, self.device,
                around=partial(self._around, timer), deadline=deadline, on_round=lambda _: on_round(),
            )  # fmt: skip
        return self._result(timings, timer.calls[WARMUP:], peak, gflops)

    @contextmanager
    def _around(self, timer: LayerTimer, kind: str) -> Iterator[None]:
        if kind == TIMED:
            with timer:
                yield
        elif kind == PATCHED:
            with self._patched() as handle:
                handle.begin_run(*self.inputs[0], **self.inputs[1])  # so that a run begins only once
                yield
        else:
            yield

    @contextmanager
    def _patched(self) -> Iterator[Patch]:
        given = {"preset": self.preset, "decisions": self.decisions}
        with patch(self.target, self.method, **given) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore", DiffAttnWarning)
            yield handle

    def _decide(self, call: Callable[[], Any]) -> None:
        """Let a patched call determine what is faster, and explain the layers accordingly."""
        with self._patched() as handle:
            call()
            self.decisions = handle.decisions()
            plan, explained = handle.plan, handle.explain(*self.latents, batch=self.batch)
        self.reasons = {name: explained[name][_phase_at_start(plan)] for name in self.specs}

    def _result(
        self, timings: Timings, calls: Sequence[OneCall], peak: float | None, gflops: Gflops | None
    ) -> Preflight:
        """The result, from the rounds and the layers' seconds in each round."""
        totals = [r[TIMED] for r in timings.rounds]
        every, covered = list(self.specs), [name for name, why in self.reasons.items() if why is None]
        weights = list(self.model.parameters())
        return Preflight(
            model=type(self.model).__name__,
            height=self.height,
            width=self.width,
            batch=self.batch,
            device=str(self.device),
            dtype=dtype_name(next(p.dtype for p in weights if p.is_floating_point())),
            method=self.method,
            preset=self.preset,
            rounds=len(timings.rounds),
            seconds=timings.seconds(PLAIN),
            share=shares(_whole(calls, every), totals),
            core_share=shares(_core(calls, every), totals),
            covered_share=shares(_core(calls, covered), totals),
            time_ratio=timings.time_ratio(PATCHED) if covered else None,
            layers=tuple(self._layer(name, calls, totals, gflops) for name in every),
            phases=self.phases,
            gflops=None if gflops is None else gflops.total,
            peak_mib=peak,
            weights_mib=sum(p.numel() * p.element_size() for p in weights) / 2**20,
            machine=describe_machine(self.device),
        )

    def _layer(self, name: str, calls: Sequence[OneCall], totals: Sequence[float], gflops: Gflops | None) -> LayerTime:
        return LayerTime(
            name=name,
            level=self.specs[name].level,
            tokens=self.tokens[name],
            seconds=Spread.of(_whole(calls, [name])),
            share=shares(_whole(calls, [name]), totals),
            core_share=shares(_core(calls, [name]), totals),
            gflops=None if gflops is None else gflops.layers[name],
            why_exact=self.reasons[name],
        )


def _whole(calls: Sequence[OneCall], names: Sequence[str]) -> list[float]:
    """Seconds of these layers together, round by round."""
    return [sum(call[name].whole for name in names) for call in calls]


def _core(calls: Sequence[OneCall], names: Sequence[str]) -> list[float]:
    """The same without their projections."""
    return [sum(call[name].core for name in names) for call in calls]


def _plain(pipe_or_model: Any) -> nn.Module:
    """The main denoiser; `ValueError` if it is patched or compiled, which would distort its times."""
    model = next(iter(denoisers_of(pipe_or_model).values()))
    inner = uncompiled(model)
    if find_patch(pipe_or_model) is not None:
        raise ValueError(f"this {type(inner).__name__} is already patched; call diffattn.unpatch first")
    if is_compiled(model):
        raise ValueError(f"this {type(inner).__name__} is compiled; the preflight needs it uncompiled")
    return inner


def _size(target: Any, model: nn.Module, height: int | None, width: int | None) -> tuple[int, int, tuple[int, int]]:
    """Height and width, given or the model's own, and those of the latents."""
    scale = pixels_per_latent(target) if isinstance(target, Pipeline) else 1
    config: Any = model.config
    own = config.get("sample_size")
    if own is None and (height is None or width is None):
        raise ValueError(f"{type(model).__name__} has no size of its own; give height and width")
    rows, columns = own if isinstance(own, Sequence) else (own or 0, own or 0)
    h = int(rows * scale if height is None else height)
    w = int(columns * scale if width is None else width)
    if isinstance(target, Pipeline):
        check_size(target, w, h)
    elif min(h, w) < 1:
        raise ValueError(f"height and width of the latents must be 1 or more, got {h}x{w}")
    return h, w, (h // scale, w // scale)


def _phase_at_start(plan: Plan) -> int:
    return min(plan.schedule.reachable([NOISE_LEVEL]))


def _phases(plan: Plan, reasons: Any) -> tuple[Phase, ...]:
    """The layers covered from each bound of the schedule up."""
    assert isinstance(plan.schedule, NoiseSchedule), "every preset has one"
    counts = [sum(why is None for why in of_phase) for of_phase in zip(*reasons, strict=True)]
    return tuple(Phase(u, n) for u, n in zip(plan.schedule.bounds, counts, strict=True))
