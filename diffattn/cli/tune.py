"""`diffattn tune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import (
    Device,
    JsonFile,
    Seed,
    bad_input,
    check_writable,
    fail,
    loading,
    progress,
    stdout,
    write_json,
)


def tune(
    model: Annotated[str, typer.Option(help="Embedded model, folder of a SiTPipeline, or hub id (owner/name).")],
    budget: Annotated[
        float, typer.Option(help="Cost of a picture in GFLOPs, as a share of that with the most mediators, up to 1.")
    ] = 0.9,
    samples: Annotated[int, typer.Option(help="Pictures that every candidate draws, the classes in turn.")] = 32,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 16,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: none.")] = 1.0,
    distance: Annotated[str, typer.Option(help="Of the latents: l1 or l2.")] = "l1",
    per_sample: Annotated[bool, typer.Option(help="Switch every sample by its own change, or all together.")] = True,
    out: Annotated[Path, typer.Option(help="Recipe for diffattn.patch(pipe, recipe=...).")] = Path(
        "outputs/recipe.json"
    ),
    seed: Seed = 0,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Find thresholds at which a SiT switches to more mediators, under a budget of floating-point operations.

    For every choice of thresholds it prints the GFLOPs of a picture, counted, and the relative error of the drawn
    latents against the most mediators with the same seeds; the nearest within the budget becomes a recipe.
    """
    check_writable(json)
    check_writable(out)
    with loading(model), bad_input():
        from diffattn.devices import choose_device
        from diffattn.evaluation.mediator_search import SearchConfig, ThresholdSearch, best_within, recipe_of
        from diffattn.loading import load_pipeline
        from diffattn.sampling import SiTPipeline

        if not 0 < budget <= 1:
            raise ValueError(f"--budget must be above 0 and at most 1, got {budget}")
        config = SearchConfig(
            samples=samples, batch=batch, steps=steps, guidance=guidance, seed=seed, distance=distance,
            per_sample=per_sample,
        )  # fmt: skip
        pipe: Any = load_pipeline(model).to(choose_device(device))
        if not isinstance(pipe, SiTPipeline):
            raise ValueError(f"tune takes a SiTPipeline with mediators, {model!r} is a {type(pipe).__name__}")
        pipe.set_progress_bar_config(disable=True)
        search = ThresholdSearch(pipe, config)
    with progress("drawing with every choice", total=search.num_candidates) as advance:
        candidates = search.candidates(lambda _: advance())
    most = max(c.gflops for c in candidates if c.num_mediators)
    try:
        best = best_within(candidates, budget * most)
    except ValueError as error:
        fail(str(error))
    for c in sorted(candidates, key=lambda c: c.gflops):
        what = f"n = {c.num_mediators}" if c.num_mediators else "r = " + ", ".join(f"{r:g}" for r in c.thresholds)
        stdout.print(f"{'-> ' if c is best else '   '}{what:<14} {c.gflops:8.4g} GFLOPs/picture  error {c.error:.4f}")
    recipe = recipe_of(best, search, model, budget)
    write_json(out, recipe)
    write_json(json, {"recipe": recipe, "candidates": [c.to_dict() for c in candidates]})
    stdout.print(f"written to {out}", markup=False)
