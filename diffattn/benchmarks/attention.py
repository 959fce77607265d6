"""How much faster one denoising step is: exact attention, agents, token merging, and the floor under them all.

One UNet with random weights per model; all variants of one size take turns on it (see `measure.interleave`). The
results are one JSON file, complete after every round; `resume` continues from it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffattn.benchmarks.result_file import ResultFile
from diffattn.benchmarks.variants import FLOOR, SDPA, VARIANTS, LeftOut, apply_variant
from diffattn.machine import cpu_threads, describe_machine, dtype_name, resolve
from diffattn.measure.interleave import Timings, interleave
from diffattn.measure.unets import MODELS, PIXELS_PER_LATENT, build_unet, make_inputs

RESULT_FILE = "attention.json"
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Raises:
        ValueError: a name or number that is not allowed; the message names it and the allowed ones.
    """

    models: tuple[str, ...] = ("sd15", "sdxl")
    sizes: tuple[int, ...] = (512, 768, 1024, 1536)  # pixels, of square pictures
    variants: tuple[str, ...] = VARIANTS
    rounds: int = 9
    warmup: int = 1  # calls of every variant before the first round
    batch: int = 2  # guidance: the unconditional and the conditional half
    levels: tuple[int, ...] | None = None  # whose self-attention is compared; None: the model's own
    min_tokens: int | None = None  # of the agents; None: the thresholds of this machine
    device: str = "auto"  # the first available of cuda, mps, cpu
    dtype: str = "auto"  # see `machine.fastest_dtype`
    threads: int | None = None  # CPU threads; None: torch's default
    compile: bool = False  # also measure compiled
    eager: bool = True  # whether to measure without compiling
    backend: str = "inductor"  # of `torch.compile`

    def __post_init__(self) -> None:
        _check_names("model", self.models, MODELS)
        _check_names("variant", self.variants, VARIANTS)
        for name in ("sizes", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for size in self.sizes:
            if size < 1 or size % PIXELS_PER_LATENT:
                raise ValueError(f"sizes are multiples of {PIXELS_PER_LATENT} pixels, got {size}")
        for name, least in (("rounds", 1), ("warmup", 0), ("batch", 1), ("threads", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")

        if not self.modes:
            raise ValueError("eager and compile are both off: there is nothing to measure")
        for model in self.models:
            there, levels = MODELS[model].attention_levels, self.levels_of(model)
            if not levels or not set(levels) <= set(there):
                raise ValueError(f"levels with self-attention in {model} are {there}, got {list(levels)}")

    def levels_of(self, model: str) -> tuple[int, ...]:
        """The levels whose self-attention is compared."""
        return MODELS[model].levels if self.levels is None else tuple(sorted(set(self.levels)))

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
                unet = build_unet(MODELS[name], self.device, self.dtype)
                for size, mode in jobs:
                    if not _is_over(deadline):
                        self._measure(unet, name, size, mode, deadline, say)
                del unet
        return self.results.data

    @property
    def is_complete(self) -> bool:
        """Whether everything has been measured."""
        return not any(self._missing(name) for name in self.config.models)

    def _missing(self, model: str) -> list[tuple[int, str]]:
        jobs = [(size, mode) for size in self.config.sizes for mode in self.config.modes]
        return [
            job for job in jobs if not self.results.is_done(model, *job, self.config.rounds, self.config.all_variants)
        ]

    def _measure(
        self,
        unet: UNet2DConditionModel,
        model: str,
        size: int,
        mode: str,
        deadline: float | None,
        say: Callable[[str], None],
    ) -> None:
        """All variants of one model, size and mode, interleaved."""
        config, levels = self.config, self.config.levels_of(model)
        left_out = _left_out(config, unet, levels)
        names = [name for name in config.all_variants if name not in left_out]
        entry = {
            "model": model,
            "title": MODELS[model].title,
            "size": size,
            "mode": mode,
            "levels": list(levels),
            "tokens": {str(level): (size // PIXELS_PER_LATENT // 2**level) ** 2 for level in levels},
            "left_out": left_out,
        }

        def keep(timings: Timings) -> None:
            done = len(timings.rounds)
            self.results.put(entry | {"complete": done >= config.rounds} | figures(timings, coverage()))
            say(f"{model} {size} px {mode}: round {done} of {config.rounds}, {sum(timings.rounds[-1].values()):.1f} s")

        prepare = _prepare_compiled if mode == COMPILED else _prepare_eager
        inputs = make_inputs(unet, size, config.batch)
        with torch.no_grad(), prepare(unet, names, levels, config, inputs) as (calls, around, coverage):
            warmup = max(config.warmup, 2) if mode == COMPILED else config.warmup
            finished = self.results.rounds_of(model, size, mode, names)
            interleave(
                calls, config.rounds, warmup, self.device,
                around=around, finished=finished, deadline=deadline, on_round=keep,
            )  # fmt: skip


def figures(timings: Timings, layers: Mapping[str, int]) -> dict[str, Any]:
    """Timings as JSON types, with the layers that ran differently and the share of what the floor saves."""
    data = timings.to_dict()
    for name, variant in data["variants"].items():
        variant["layers"] = layers[name]
        if FLOOR in data["variants"] and name not in (SDPA, FLOOR):
            variant["share_of_floor_saving"] = timings.share_of_saving(name, FLOOR)
    return data


Prepared = tuple[
    dict[str, Callable[[], Any]],  # what to time
    Callable[[str], AbstractContextManager[Any]],  # a context around every call of a variant
    Callable[[], dict[str, int]],  # variant -> layers that ran differently
]


@contextmanager
def _prepare_eager(
    unet: nn.Module, names: list[str], levels: tuple[int, ...], config: BenchmarkConfig, inputs: Any
) -> Iterator[Prepared]:
    """One UNet; every variant is applied before and removed after each of its calls."""
    layers: dict[str, int] = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        with apply_variant(name, unet, levels, config.min_tokens) as coverage:
            yield
            layers[name] = coverage()

    args, kwargs = inputs
    yield {name: partial(unet, *args, **kwargs) for name in names}, around, lambda: layers


@contextmanager
def _prepare_compiled(
    unet: nn.Module, names: list[str], levels: tuple[int, ...], config: BenchmarkConfig, inputs: Any
) -> Iterator[Prepared]:
    """One compiled UNet per variant, kept throughout: changing one would recompile it. They share weights."""
    args, kwargs = inputs
    torch._dynamo.reset()
    with ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=64):  # no variant falls back to eager
        calls, coverages = {}, {}
        for name in names:
            twin = _twin(unet)
            twin.compile(dynamic=False, backend=config.backend)
            coverages[name] = stack.enter_context(apply_variant(name, twin, levels, config.min_tokens))
            calls[name] = partial(twin, *args, **kwargs)
        yield calls, lambda name: nullcontext(), lambda: {name: covered() for name, covered in coverages.items()}
    torch._dynamo.reset()


def _twin(unet: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def _left_out(config: BenchmarkConfig, unet: nn.Module, levels: tuple[int, ...]) -> dict[str, str]:
    """Variants that cannot run here, and why."""
    reasons = {}
    for name in config.all_variants:
        try:
            with apply_variant(name, unet, levels, config.min_tokens):
                pass
        except LeftOut as error:
            reasons[name] = str(error)
    return reasons


def _conditions(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    settings = asdict(config) | {"device": str(device), "dtype": dtype_name(dtype)}
    return {"machine": describe_machine(device), "settings": settings}


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _check_names(what: str, names: tuple[str, ...], allowed: Any) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
