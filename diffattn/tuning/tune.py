"""`diffattn.tune`: the cheapest setting for every layer and noise level within a budget of error, or of time.

`tuning.calibrate` orders the places in which to give up exactness, for every method alone and for all of them;
`tuning.search` measures with whole runs which of these orders to follow, and how far to go.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffattn.drawing.request import Request
from diffattn.files import write_json
from diffattn.machine import describe_device, dtype_name, versions
from diffattn.tuning.calibrate import Calibration, groups_of, self_attention_layers
from diffattn.tuning.config import TuneConfig, Workload
from diffattn.tuning.probe import FLOPS
from diffattn.tuning.runs import PipelineRuns
from diffattn.tuning.search import Rival, Search, Verified
from diffattn.tuning.settings import Setting, routes_of, settings_of


@dataclass(frozen=True)
class Tuned:
    """The recipe, and the measurements behind it.

    Attributes:
        recipe: for `diffattn.patch(pipe, recipe=...)`, as JSON types.
        speedup: of the denoiser's calls over a run: measured, or counted.
        verified: errors of the recipe on the prompts it was tuned on.
        checks: all recipes that were verified during the search.
        rivals: the fixed presets, if requested, each with a recipe that is as close.
    """

    recipe: dict[str, Any]
    speedup: float
    verified: Verified
    checks: tuple[Verified, ...] = field(repr=False)
    rivals: tuple[Rival, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON, creating its folder."""
        write_json(Path(path), self.recipe)


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    max_error: float | None = None,
    min_speedup: float | None = None,
    candidates: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
    model: str = "",
    on_call: Callable[[], None] | None = None,
    **config: Any,
) -> Tuned:
    """Choose, for every self-attention layer and band of noise levels, the cheapest setting within a budget.

        tuned = diffattn.tune(pipe, ["crab", "red apple", "snail", "key"], max_error=0.05)
        tuned.save("recipe.json")
        diffattn.patch(pipe, recipe="recipe.json")

    The error is ‖x - x*‖ / ‖x*‖ of the final latents against the unpatched run with the same noise, mean over
    prompts. The recipe promises the measured one plus two standard errors, and the speed-up. The promise covers
    pictures drawn under the same conditions: model, size, sampler, steps, guidance, and prompts of the same kind. The
    pipeline is left unchanged.

    Args:
        pipe: a pipeline that draws from text alone, or a `SiTPipeline` with softmax attention; unpatched, not compiled.
        prompts: what to draw, one picture each (class names or ids for a `SiTPipeline`).
        max_error: the error to stay below; then the recipe is as fast as that allows.
        min_speedup: of the denoiser's calls over a run; then the recipe is as close as that allows.
        candidates: pairs of a method's name and options; None: a default selection from all methods.
        model: the model's name, for the protocol; it also determines an embedded model's own guidance.
        on_call: called before every call of the denoiser; `workload` gives an upper bound of their number.
        **config: other fields of `TuneConfig`.

    Raises:
        ValueError: an argument out of range; neither or both budgets; no prompts; as `diffattn.drawing.draw.prepare`.
            Its subclass `CannotTune`: a budget that cannot be met; the message says what is possible.
        TypeError: the pipeline is not supported.
    """
    chosen = TuneConfig(max_error=max_error, min_speedup=min_speedup, **config)
    settings = settings_of(candidates)
    runs = _runs(pipe, prompts, model, chosen, on_call)
    with runs.watched():
        search = Search(runs, settings, chosen)
        best = search.best()
        chosen_recipe = search.recipe(best.route, best.rungs)
        speedup = search.speedups.get((best.route, best.rungs)) or search.speedup(chosen_recipe)
        checks = tuple(search.checks)
        rivals = tuple(search.rival(*preset) for preset in _presets(chosen, settings))
    recipe = chosen_recipe | {
        "promised": {"error": best.promise, "speedup": speedup},  # as verified; the budgets are in the protocol
        "verified": {
            "error": best.error,
            "error_per_prompt": list(best.errors),
            "two_standard_errors_above": best.promise,
            "speedup": speedup,
        },
        "protocol": _protocol(runs, chosen, search.found, settings),
    }
    return Tuned(recipe, speedup, best, checks, rivals)


def workload(
    pipe: Any,
    prompts: Sequence[str],
    *,
    candidates: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
    model: str = "",
    **config: Any,
) -> Workload:
    """The maximum number of denoiser calls of `tune` with the same arguments; raises the same errors."""
    chosen = TuneConfig(**config)
    runs = _runs(pipe, prompts, model, chosen, None)
    count, steps, bands = len(runs.requests), chosen.steps, min(chosen.bands, chosen.steps)
    probed, groups = min(count, chosen.probed), len(groups_of(self_attention_layers(runs)))
    by_error, choices = chosen.max_error is not None, settings_of(candidates)
    routes = len(routes_of(choices))
    compared = routes if routes > 1 else 0
    measured = 1 if chosen.cost == FLOPS else chosen.rounds + 1
    speedups = 1 if by_error else 2 * chosen.checks + 2
    calls = {
        "exact runs": count * steps,
        "single layers": probed * bands * (2 + groups),
        "single bands": probed * bands * steps,
        "verification": (compared + (chosen.checks if by_error else 1)) * count * steps,
        "speed": bands * measured * (1 + 2 * speedups),
    }
    if rivals := len(_presets(chosen, choices)):
        calls["presets"] = rivals * ((1 + compared + chosen.checks) * count * steps + bands * measured * 4)
    return Workload(calls, steps)


def _presets(config: TuneConfig, settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """(method, preset) of every method among the settings, if presets are to be compared."""
    methods = {s.method.name: s.method for s in settings} if config.presets else {}
    return [(name, preset) for name, method in methods.items() for preset in method.presets]


def _runs(
    pipe: Any, prompts: Sequence[str], model: str, config: TuneConfig, on_call: Callable[[], None] | None
) -> PipelineRuns:
    request = Request(
        model=model, prompt="", steps=config.steps, guidance=config.guidance, width=config.width, height=config.height,
        seed=config.seed,
    )  # fmt: skip
    return PipelineRuns(pipe, prompts, request, on_call)


def _protocol(
    runs: PipelineRuns, config: TuneConfig, found: Calibration, settings: Sequence[Setting]
) -> dict[str, Any]:
    """Everything that the promise depends on, as JSON types."""
    first, pipe = runs.requests[0], runs.pipe
    prompts = "\n".join(request.prompt for request in runs.requests)
    return {
        "model": first.model,
        "pipeline": type(pipe).__name__,
        "denoiser": type(runs.denoiser).__name__,
        "prompts": len(runs.requests),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "seeds": [first.seed, runs.requests[-1].seed],
        "steps": first.steps,
        "guidance": first.guidance,
        "width": first.width,
        "height": first.height,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": dtype_name(runs.denoiser.dtype),  # type: ignore[arg-type]
        "device": str(runs.device),
        "machine": describe_device(runs.device),
        "max_error": config.max_error,
        "min_speedup": config.min_speedup,
        "error": "relative L2 error of the final latents against the unpatched run, mean over prompts",
        "cost": config.cost,
        "bands": list(found.bounds),
        "candidates": {s.name: {"method": s.method.name, "options": dict(s.options)} for s in settings},
        "versions": versions(),
    }
