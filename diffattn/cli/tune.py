"""`diffattn tune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import (
    bad_input,
    check_outputs,
    fail,
    loading,
    progress,
    stderr,
    stdout,
    write_json,
)
from diffattn.cli.options import Device, Dtype, Height, JsonFile, Model, Prompts, Seed, Variant, Width

OUT = Path("outputs/recipe.json")
MAX_ERROR = "Largest relative error of the final latents (mean over the prompts), up to 1."
GUIDANCE = "Classifier-free guidance scale; 1 or less turns guidance off."
PRESETS = "Also measure the fixed presets, each against a recipe with at most its error. [default: no-presets]"
BUDGET = "With mediators: GFLOPs per picture as a share of those with the most mediators, up to 1."
SAMPLES = "With mediators: pictures drawn per candidate, cycling through the classes."
DISTANCE = "With mediators: distance between successive latents, l1 or l2."
PER_SAMPLE = "With mediators: switch each sample by its own change, or all together. [default: per-sample]"

BY_ERROR = ("--prompts", "--max-error", "--min-speedup", "--bands", "--cost", "--width", "--height", "--presets")
BY_BUDGET = ("--budget", "--samples", "--batch", "--distance", "--per-sample")
"""Options that apply to only one of the two kinds of tuning."""


def tune(
    model: Model,
    variant: Variant = None,
    prompts: Prompts = None,
    max_error: Annotated[float | None, typer.Option(help=MAX_ERROR)] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(help="Instead of --max-error: the minimum speed-up of a run's denoiser calls, above 1."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", show_default="25; 50 with mediators")] = None,
    guidance: Annotated[float | None, typer.Option(help=GUIDANCE, show_default="the model's own")] = None,
    width: Width = None,
    height: Height = None,
    bands: Annotated[int | None, typer.Option(help="Bands of noise levels tuned separately.", show_default="4")] = None,
    cost: Annotated[str | None, typer.Option(help="time (measured here) or flops.", show_default="time")] = None,
    presets: Annotated[bool | None, typer.Option("--presets/--no-presets", help=PRESETS)] = None,
    budget: Annotated[float | None, typer.Option(help=BUDGET, show_default="0.9")] = None,
    samples: Annotated[int | None, typer.Option(help=SAMPLES, show_default="32")] = None,
    batch: Annotated[int | None, typer.Option(help="With mediators: batch size.", show_default="16")] = None,
    distance: Annotated[str | None, typer.Option(help=DISTANCE, show_default="l1")] = None,
    per_sample: Annotated[bool | None, typer.Option("--per-sample/--no-per-sample", help=PER_SAMPLE)] = None,
    out: Annotated[Path, typer.Option(help="Recipe for diffattn.patch(pipe, recipe=...).")] = OUT,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Find the fastest settings within a budget, and write them as a recipe.

    With --prompts and --max-error or --min-speedup: chooses the cheapest setting for every self-attention layer and
    band of noise levels, draws every prompt with and without the recipe, and promises the measured mean error plus two
    standard errors, at most --max-error, and the speed-up.

    For a SiT with mediators, with --budget: finds the thresholds at which it switches to more mediators. For every
    choice it prints the counted GFLOPs per picture and the relative error of the latents against the most mediators.
    """
    check_outputs(json, out)
    by_error: dict[str, Any] = dict(
        zip(BY_ERROR, (prompts, max_error, min_speedup, bands, cost, width, height, presets), strict=True)
    )
    by_budget: dict[str, Any] = dict(zip(BY_BUDGET, (budget, samples, batch, distance, per_sample), strict=True))
    with loading(model), bad_input():
        from diffattn.drawing.loading import load_pipeline
        from diffattn.evaluation import load_prompts
        from diffattn.machine import choose_device, choose_dtype
        from diffattn.methods import METHODS
        from diffattn.patching.default_method import default_method

        place = choose_device(device)
        words = load_prompts(prompts) if prompts is not None else []
        pipe: Any = load_pipeline(model, choose_dtype(dtype, place), variant).to(place)
        pipe.set_progress_bar_config(disable=True)
        mediators = METHODS[default_method(pipe)].tuned_by_change
        what = f"{model!r}, {'a SiT with mediators' if mediators else f'a {type(pipe).__name__}'},"
        _refuse(what, by_error if mediators else by_budget)
    common = {"steps": steps, "guidance": guidance, "seed": seed}
    if mediators:
        found = _thresholds(pipe, model, budget, _given(common, samples=samples, batch=batch, distance=distance,
                                                        per_sample=per_sample))  # fmt: skip
    else:
        limits = {"max_error": max_error, "min_speedup": min_speedup}
        config = _given(common, bands=bands, cost=cost, width=width, height=height, presets=presets)
        found = _settings(pipe, model, words if prompts is not None else None, limits, config)
    write_json(out, found["recipe"])
    write_json(json, found)
    stdout.print(f"written to {out}", markup=False)


def _settings(
    pipe: Any, model: str, prompts: list[str] | None, limits: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """A recipe by layer and noise level, and every recipe that was verified."""
    from diffattn.tuning.config import CannotTune
    from diffattn.tuning.tune import tune as search
    from diffattn.tuning.tune import workload

    with bad_input():
        if prompts is None:
            raise ValueError("tuning needs --prompts, a file with one prompt per line")
        work = workload(pipe, prompts, model=model, **limits, **config)
    stderr.print(str(work), markup=False)
    try:
        with progress("calls of the denoiser", total=work.total) as advance:
            tuned = search(pipe, prompts, model=model, on_call=advance, **limits, **config)
    except CannotTune as error:
        fail(str(error))
    for check in tuned.checks:
        mark = "->" if check is tuned.verified else "  "
        stdout.print(
            f"{mark} {check.route}: error {check.error:.4f} (promise {check.promise:.4f}), "
            f"expected {check.expected:.4f} at {check.expected_speedup:.3f}x",
            markup=False,
        )
    unit = "counted" if tuned.recipe["protocol"]["cost"] == "flops" else "measured"
    stdout.print(
        f"promised: error {tuned.recipe['promised']['error']:.4f}; denoiser {tuned.speedup:.3f}x as fast, {unit}"
    )
    for rival in tuned.rivals:
        stdout.print(_rival_line(rival), markup=False)
    checks, rivals = ([x.to_dict() for x in found] for found in (tuned.checks, tuned.rivals))
    return {"recipe": tuned.recipe, "checks": checks, "rivals": rivals}


def _rival_line(rival: Any) -> str:
    """One line that compares a preset with the recipe of at most its error."""
    if rival.is_beaten is None:
        return f"preset {rival.preset}: accelerates nothing at this size"
    if rival.tuned is None:
        return (
            f"preset {rival.preset}: error {rival.error:.4f} at {rival.speedup:.3f}x; NOT beaten, no recipe tried is "
            "as close"
        )
    word = "beaten" if rival.is_beaten else "NOT beaten"
    return (
        f"preset {rival.preset}: error {rival.error:.4f} at {rival.speedup:.3f}x; {word} by a recipe "
        f"with error {rival.tuned.error:.4f} at {rival.tuned_speedup:.3f}x"
    )


def _thresholds(pipe: Any, model: str, budget: float | None, config: dict[str, Any]) -> dict[str, Any]:
    """A recipe with thresholds for mediators, and every candidate."""
    from dataclasses import replace

    from diffattn.drawing.classes import unguided_note
    from diffattn.drawing.draw import guidance_for
    from diffattn.tuning.mediators import SearchConfig, ThresholdSearch, best_within, thresholds_recipe

    share = 0.9 if budget is None else budget
    given = config.get("guidance")
    note = unguided_note(pipe, given)
    with bad_input():
        if not 0 < share <= 1:
            raise ValueError(f"--budget must be above 0 and at most 1, got {share}")
        checked = SearchConfig(**config)  # as given: `guidance_for` raises what is out of range
        search = ThresholdSearch(pipe, replace(checked, guidance=guidance_for(pipe, given, model)))
    with progress("drawing with every choice", total=search.num_candidates) as advance:
        candidates = search.candidates(lambda _: advance())
    most = max(c.gflops for c in candidates if c.num_mediators)
    try:
        best = best_within(candidates, share * most)
    except ValueError as error:
        fail(str(error))
    if note:
        stdout.print(note, markup=False)
    for c in sorted(candidates, key=lambda c: c.gflops):
        what = f"n = {c.num_mediators}" if c.num_mediators else "r = " + ", ".join(f"{r:g}" for r in c.thresholds)
        stdout.print(f"{'-> ' if c is best else '   '}{what:<14} {c.gflops:8.4g} GFLOPs/picture  error {c.error:.4f}")
    return {"recipe": thresholds_recipe(best, search, model, share), "candidates": [c.to_dict() for c in candidates]}


def _given(*groups: dict[str, Any], **values: Any) -> dict[str, Any]:
    """All values that are not None; the library's defaults apply to the rest."""
    merged = {name: value for group in (*groups, values) for name, value in group.items()}
    return {name: value for name, value in merged.items() if value is not None}


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Raise `ValueError` for options that do not apply to this model."""
    if wrong := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{what} is not tuned with {', '.join(wrong)}; see diffattn tune --help")
