"""Whole steps of models of real sizes, eager and compiled, by the benchmark behind `diffattn bench attention`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffattn.benchmarks.attention import COMPILED, EAGER, Benchmark, BenchmarkConfig
from diffattn.benchmarks.variants import FLOOR, SDPA, VARIANTS
from diffattn.machine import dtype_name
from diffattn.measure.models import MODELS

from .item import Item, Setting

KIND = "step"
MEASURED = tuple(name for name in (SDPA, FLOOR, "balanced", "keys") if name in VARIANTS)
ROUNDS = 15  # steps are so long that fewer rounds suffice than for attention alone


@dataclass(frozen=True)
class Step:
    """One model at one size."""

    model: str  # a key of `MODELS`
    size: int  # see `BenchmarkConfig`
    minutes: float  # estimated, eager; on a large GPU most of it is building the model
    compiling: float  # the same, compiled
    batch: int = 2  # both halves of guidance


STEPS = (
    Step("sd15", 1024, 0.4, 4),
    Step("sd15", 1536, 0.5, 4),
    Step("sd15", 2048, 0.8, 4),
    Step("sdxl", 1024, 0.5, 6),
    Step("sdxl", 2048, 0.8, 6),
    Step("sd35m", 1024, 0.5, 4),
    Step("sd35m", 1440, 0.6, 4),
    Step("sd35m", 2048, 0.8, 4),
    Step("flux", 1024, 1, 6, batch=1),
    Step("flux", 2048, 2, 7, batch=1),
    Step("wan-1.3b", 480, 2.5, 6),
    Step("pixart-sigma", 2048, 0.8, 4),
    Step("z-image", 2048, 1.5, 6, batch=1),
    Step("cogvideox-2b", 480, 1.5, 5),
)
TINY = (
    Step("tiny", 128, 0.1, 0.1),
    Step("tiny-sd3", 384, 0.1, 0.1),
    Step("tiny-flux", 512, 0.1, 0.1, batch=1),
    Step("tiny-wan", 96, 0.1, 0.1),
)


def items(setting: Setting) -> Iterator[Item]:
    """Eager first: the compiled ones take longer, and say less about what the method costs."""
    for mode in (EAGER, COMPILED):
        for step in TINY if setting.tiny else STEPS:
            name = f"step-{step.model}-{step.size}-{mode}"
            title = f"a step of the {MODELS[step.model].title}, {step.size} px, batch {step.batch}, {mode}"
            minutes = step.minutes if mode == EAGER else step.compiling
            yield Item(name, KIND, title, minutes, partial(measure, setting, name, step, mode))


def measure(setting: Setting, name: str, step: Step, mode: str, deadline: float) -> dict[str, Any]:
    """The entry of the benchmark's result file, which stays beside the item's own and is resumed."""
    config = BenchmarkConfig(
        models=(step.model,), sizes=(step.size,), variants=MEASURED, batch=step.batch,
        rounds=min(ROUNDS, setting.rounds), device=str(setting.device), dtype=dtype_name(setting.dtype),
        eager=mode == EAGER, compile=mode == COMPILED, backend=setting.backend,
        min_tokens=0 if setting.tiny else None,
    )  # fmt: skip
    benchmark = Benchmark(config, setting.out / "steps" / name, resume=True)
    benchmark.run(time_budget=max(deadline - time.monotonic(), 1.0), say=lambda line: None)
    found = benchmark.results.find(step.model, step.size, mode)
    return {"complete": False} if found is None else {**found, "batch": step.batch}
