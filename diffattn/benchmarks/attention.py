"""Time of one denoising step with exact attention, agents, token merging, and at the floor: without attention.

One UNet or transformer with random weights per model; all variants of one size take turns on it (see
`measure.interleave`). The results are one JSON file, complete after every round; `resume` continues from it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffattn.architectures import architecture_of
from diffattn.architectures.denoisers import self_attention_layers, uncompiled
from diffattn.benchmarks.result_file import ResultFile
from diffattn.benchmarks.variants import FLOOR, SDPA, VARIANTS, LeftOut, apply_variant
from diffattn.machine import cpu_threads, describe_machine, dtype_name, resolve
from diffattn.measure.interleave import Timings, interleave
from diffattn.measure.memory import peak_mib
from diffattn.measure.models import MODELS
from diffattn.patching.patch import find_patch

RESULT_FILE = "attention.json"
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Raises:
        ValueError: a name or number that is not allowed; the message names it and the allowed ones.
    """

    models: tuple[str, ...] = ("sd15", "sdxl")
    sizes: tuple[int, ...] | None = None  # shorter sides in pixels; None: the models' own
    variants: tuple[str, ...] = VARIANTS
    rounds: int = 9
    warmup: int = 1  # calls of every variant before the first round
    batch: int = 2  # guidance: the unconditional and the conditional half
    levels: tuple[int, ...] | None = None  # whose self-attention is compared; None: the model's own
    min_tokens: int | None = None  # of the agents; None: the thresholds of this machine
    max_head_error: float | None = None  # of the agents; None: their own, inf: no head falls back
    device: str = "auto"  # the first available of cuda, mps, cpu
    dtype: str = "auto"  # see `machine.fastest_dtype`
    threads: int | None = None  # CPU threads; None: torch's default
    all_layers: bool = False  # also where the model's row has fewer, see `BenchmarkModel.fewer`
    compile: bool = False  # also measure compiled
    eager: bool = True  # whether to measure without compiling
    backend: str = "inductor"  # of `torch.compile`

    def __post_init__(self) -> None:
        _check_names("model", self.models, MODELS)
        _check_names("variant", self.variants, VARIANTS)
        for name in ("sizes", "models"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must name at least one")
        for model in self.models:
            for size in self.sizes_of(model):
                MODELS[model].shape(size)  # raises
        for name, least in (("rounds", 1), ("warmup", 0), ("batch", 1), ("threads", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.max_head_error is not None and not self.max_head_error > 0:
            raise ValueError(f"max_head_error must be above 0, got {self.max_head_error}")
        if not self.modes:
            raise ValueError("eager and compile are both off: there is nothing to measure")
        for model in self.models:
            there, levels = MODELS[model].attention_levels, self.levels_of(model)
            if not levels or not set(levels) <= set(there):
                raise ValueError(f"levels with self-attention in {model} are {there}, got {list(levels)}")

    def levels_of(self, model: str) -> tuple[int, ...]:
        """The levels whose self-attention is compared."""
        return MODELS[model].levels if self.levels is None else tuple(sorted(set(self.levels)))

    def sizes_of(self, model: str) -> tuple[int, ...]:
        """The sizes that are measured."""
        return MODELS[model].sizes if self.sizes is None else self.sizes

    @property
    def limits(self) -> tuple[int | None, float | None]:
        """`min_tokens` and `max_head_error`."""
        return self.min_tokens, self.max_head_error

    @property
    def all_variants(self) -> tuple[str, ...]:
        """The variants, with the reference first whether or not it was named."""
        return (SDPA, *(name for name in dict.fromkeys(self.variants) if name != SDPA))

    @property
    def modes(self) -> tuple[str, ...]:
        return (*((EAGER,) if self.eager else ()), *((COMPILED,) if self.compile else ()))


class Benchmark:
    """One benchmark, checked and ready to run; its results are `RESULT_FILE` in the folder `out`."""

    def __init__(self, config: BenchmarkConfig, out: Path, *, resume: bool = False) -> None:
        """With `resume`, existing results in the folder are kept and only missing ones are measured.

        Raises:
            ValueError: the device cannot be used, or the results to resume were made under other conditions.
        """
        self.config = config
        self.device, self.dtype = resolve(config.device, config.dtype)
        with cpu_threads(config.threads):
            self.results = ResultFile(out / RESULT_FILE, _conditions(config, self.device, self.dtype), resume)

    def run(self, *, time_budget: float | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Measure, and return the content of the result file.

        Args:
            time_budget: seconds; no round starts that would end later, apart from the first of the current model and
                size. Results that were cut short have `complete` false, or are missing.
            say: called with lines about the progress.
        """
        deadline = None if time_budget is None else time.monotonic() + time_budget
        with cpu_threads(self.config.threads):
            for name in self.config.models:
                jobs = self._missing(name)
                if not jobs or _is_over(deadline):
                    continue
                say(f"building the {MODELS[name].title}, {dtype_name(self.dtype)} on {self.device}")
                few = not self.config.all_layers and MODELS[name].shortened(self.device, self.dtype)
                denoiser = MODELS[name].build(self.device, self.dtype, few)
                for size, mode in jobs:
                    if not _is_over(deadline):
                        about = _about(denoiser, name, size, mode, self.config.levels_of(name), few)
                        self._measure(denoiser, about, deadline, say)
                del denoiser
        return self.results.data

    @property
    def is_complete(self) -> bool:
        """Whether everything has been measured."""
        return not any(self._missing(name) for name in self.config.models)

    def _missing(self, model: str) -> list[tuple[int, str]]:
        jobs = [(size, mode) for size in self.config.sizes_of(model) for mode in self.config.modes]
        return [
            job for job in jobs if not self.results.is_done(model, *job, self.config.rounds, self.config.all_variants)
        ]

    def _measure(
        self, denoiser: nn.Module, about: dict[str, Any], deadline: float | None, say: Callable[[str], None]
    ) -> None:
        """All variants of one model, size and mode, interleaved; `about`: what they have in common."""
        config, levels = self.config, tuple(about["levels"])
        model, size, mode = key = (about["model"], about["size"], about["mode"])
        left_out = _left_out(config, denoiser, levels)
        names = [name for name in config.all_variants if name not in left_out]
        finished = self.results.rounds_of(*key, names)
        peaks = self.results.values_of(*key, "peak_call_mib") if finished else {}

        def keep(timings: Timings) -> None:
            done = len(timings.rounds)
            about_variants = figures(timings, covered(), peaks)
            self.results.put(about | {"left_out": left_out, "complete": done >= config.rounds} | about_variants)
            say(f"{model} {size} px {mode}: round {done} of {config.rounds}, {sum(timings.rounds[-1].values()):.1f} s")

        prepare = _prepare_compiled if mode == COMPILED else _prepare_eager
        inputs = MODELS[model].inputs(denoiser, size, config.batch)
        with torch.no_grad(), prepare(denoiser, names, levels, config, inputs) as (calls, around, covered):
            warm_up = max(config.warmup, 2) if mode == COMPILED else config.warmup
            first = [] if peaks else names
            for name in first:  # which warms up as well
                with around(name):
                    if mode == COMPILED:
                        calls[name]()
                    peaks[name] = peak_mib(calls[name], self.device)
            interleave(
                calls, config.rounds, max(warm_up - bool(first), 0), self.device,
                around=around, finished=finished, deadline=deadline, on_round=keep,
            )  # fmt: skip


@dataclass(frozen=True)
class Covered:
    """What one variant changed in its last call."""

    layers: int  # that ran differently
    exact_heads: float | None = None  # share of their heads that fell back to exact attention; None: not counted


def _covered(layers: int, denoiser: nn.Module, batch: int) -> Covered:
    """What the applied variant changed: `layers`, and what its patch reports, if it is a patch."""
    handle = find_patch(denoiser)
    if handle is None or handle.plan.method == FLOOR:
        return Covered(layers)
    heads = {spec.name: spec.num_heads for spec, _ in self_attention_layers(denoiser)}
    ran = [layer for layer in handle.report().layers if layer.accelerated]
    every = sum(layer.accelerated * heads[layer.name] * batch for layer in ran)
    return Covered(layers, sum(layer.exact_heads for layer in ran) / every if every else None)


def _about(
    denoiser: nn.Module, model: str, size: int, mode: str, levels: tuple[int, ...], shortened: bool
) -> dict[str, Any]:
    """The fields that all variants of a result share, as JSON types."""
    row = MODELS[model]
    grids = architecture_of(uncompiled(denoiser)).grids(uncompiled(denoiser), *row.latents(size))
    return {
        "model": model,
        "title": row.title,
        "class": row.kind,
        "size": size,
        "pixels": str(row.shape(size)),
        "depth": row.depth_text(shortened),
        "mode": mode,
        "levels": list(levels),
        "tokens": {str(level): prod(grids[level]) for level in levels},
    }


def figures(
    timings: Timings, covered: Mapping[str, Covered], peaks: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """Timings and figures derived from them, as JSON types.

    For every variant: the layers that ran differently, the share of the floor's saving, the share of heads that fell
    back to exact attention, and the peak memory of a call beyond the weights, also relative to exact attention. For
    all: the share of attention in a step (exact - floor) and the ceiling of any method's speed-up (exact / floor); None
    where the floor was not measured, or saves nothing measurable.
    """
    data, peaks = timings.to_dict(), peaks or {}
    for name, variant in data["variants"].items():
        variant["layers"] = covered[name].layers
        if FLOOR in data["variants"] and name not in (SDPA, FLOOR):
            variant["share_of_floor_saving"] = timings.share_of_saving(name, FLOOR)
        if covered[name].exact_heads is not None:
            variant["exact_head_share"] = covered[name].exact_heads
        peak, exact = peaks.get(name), peaks.get(SDPA)
        if peak is not None:
            variant |= {"peak_call_mib": peak, "peak_ratio": peak / exact if exact else None}
    floor = timings.time_ratio(FLOOR) if FLOOR in data["variants"] else None
    saves = floor is not None and floor.q75 < 1
    share, ceiling = (1 - floor.median, 1 / floor.median) if floor is not None and saves else (None, None)
    return data | {"attention_share": share, "ceiling": ceiling}


Prepared = tuple[
    dict[str, Callable[[], Any]],  # what to time
    Callable[[str], AbstractContextManager[Any]],  # a context around every call of a variant
    Callable[[], dict[str, Covered]],
]


@contextmanager
def _prepare_eager(
    denoiser: nn.Module, names: list[str], levels: tuple[int, ...], config: BenchmarkConfig, inputs: Any
) -> Iterator[Prepared]:
    """One denoiser; every variant is applied before and removed after each of its calls."""
    args, kwargs = inputs
    found: dict[str, Covered] = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        with apply_variant(name, denoiser, levels, *config.limits) as coverage:
            if handle := find_patch(denoiser):
                handle.begin_run(*args, **kwargs)  # work done once per run does not count as part of a step
            yield
            found[name] = _covered(coverage(), denoiser, config.batch)

    yield {name: partial(denoiser, *args, **kwargs) for name in names}, around, lambda: found


@contextmanager
def _prepare_compiled(
    denoiser: nn.Module, names: list[str], levels: tuple[int, ...], config: BenchmarkConfig, inputs: Any
) -> Iterator[Prepared]:
    """One compiled denoiser per variant, kept throughout: changing one would recompile it. They share weights."""
    args, kwargs = inputs
    torch._dynamo.reset()
    with ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=64):  # no variant falls back to eager
        calls, coverages = {}, {}
        for name in names:
            twin = _twin(denoiser)
            twin.compile(dynamic=False, backend=config.backend)
            coverages[name] = stack.enter_context(apply_variant(name, twin, levels, *config.limits))
            calls[name] = partial(twin, *args, **kwargs)
        yield calls, lambda name: nullcontext(), lambda: {name: Covered(c()) for name, c in coverages.items()}
    torch._dynamo.reset()


def _twin(denoiser: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights."""
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())})


def _left_out(config: BenchmarkConfig, denoiser: nn.Module, levels: tuple[int, ...]) -> dict[str, str]:
    """Variants that cannot run here, and why."""
    reasons = {}
    for name in config.all_variants:
        try:
            with apply_variant(name, denoiser, levels, *config.limits):
                pass
        except LeftOut as error:
            reasons[name] = str(error)
    return reasons


def _conditions(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    settings = asdict(config) | {"device": str(device), "dtype": dtype_name(dtype)}
    if config.max_head_error == inf:
        settings["max_head_error"] = "inf"  # for which JSON has no number
    return {"machine": describe_machine(device), "settings": settings}


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _check_names(what: str, names: tuple[str, ...], allowed: Any) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
