"""`diffattn bench`: speed of attention on this machine, exact and accelerated."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from diffattn.cli.common import bad_input, check_outputs, check_writable, fail, loading, stdout, write_json
from diffattn.cli.options import Device, FastestDtype, JsonFile, Resume, Threads

NOT_FINISHED = 1
FEW_STEPS = 4  # enough to reach every noise level of the presets
BUDGET = 1.7  # minutes for the thresholds

T = TypeVar("T")
app = typer.Typer(
    help="Measure speed on this machine: whole denoising steps, mediators, or the token counts from which agents pay.",
    no_args_is_help=True,
)


@app.command("attention")
def attention(
    models: Annotated[
        str,
        typer.Option(
            help="Published sizes with random weights: sd15, sdxl, sd35m, pixart-sigma, flux, z-image, wan-1.3b, "
            "cogvideox-2b."
        ),
    ] = "sd15,sdxl",
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Sides of square pictures, or shorter sides of videos (480 is 480p), in pixels. [default: UNets "
            "512,768,1024,1536; sd35m 1440; other pictures 2048; videos 480]"
        ),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            help="What to compare with sdpa: presets of agent attention, keys (downsampled), tiles, tome (tomesd), "
            "floor (attention returns the values)."
        ),
    ] = "sdpa,balanced,fast,paper,tome,floor",
    rounds: Annotated[int, typer.Option(help="Timings per variant; the variants take turns.")] = 9,
    warmup: Annotated[int, typer.Option(help="Untimed calls of each variant before the first round.")] = 1,
    batch: Annotated[int, typer.Option(help="Batch size of one step; 2 is one picture with guidance.")] = 2,
    levels: Annotated[
        str | None, typer.Option(help="UNet levels whose self-attention is compared. [default: sd15 0,1; sdxl 1,2]")
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Layers with fewer tokens use exact attention. [default: this machine's thresholds]"),
    ] = None,
    max_head_error: Annotated[
        float | None,
        typer.Option(
            help="Heads of agents that are further off run exact; inf: none does, for random weights. [default: the "
            "preset's]"
        ),
    ] = None,
    device: Device = "auto",
    dtype: FastestDtype = "auto",
    threads: Threads = None,
    all_layers: Annotated[
        bool,
        typer.Option("--all-layers", help="Keep every layer of a transformer, even on a CPU or if memory is short."),
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Measure with torch.compile as well.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for attention.json and attention.png.")] = Path("outputs/bench"),
    resume: Resume = False,
    time_budget: Annotated[float | None, typer.Option(help="Start no further round after this many minutes.")] = None,
    json: JsonFile = None,
) -> None:
    """Time one denoising step: exact attention, agents, fewer keys, token merging, and no attention at all.

    On a CPU, or where memory is short, transformers keep only some of their layers; the result says how many.

    Results are written after every round, so you can interrupt at any time and resume with --resume.
    """
    check_outputs(json, out, folder=True)
    with bad_input():
        from diffattn.benchmarks.attention import Benchmark, BenchmarkConfig
        from diffattn.benchmarks.attention_report import plot, table

        config = BenchmarkConfig(
            models=_list(models, "models"), sizes=None if sizes is None else _list(sizes, "sizes", int),
            variants=_list(variants, "variants"), all_layers=all_layers,
            rounds=rounds, warmup=warmup, batch=batch, min_tokens=min_tokens, max_head_error=max_head_error,
            levels=None if levels is None else _list(levels, "levels", int), threads=threads, compile=compile,
            device=device, dtype=dtype,
        )  # fmt: skip
        benchmark = Benchmark(config, out, resume=resume)
    results = benchmark.run(time_budget=_seconds(time_budget), say=_say)
    write_json(json, results)
    stdout.print(table(results), markup=False)
    try:
        plot(results, out / "attention.png")
    except ValueError as error:
        stdout.print(f"no plot: {error}", markup=False)
    _check_finished(benchmark.is_complete)


@app.command("mediator")
def mediator(
    what: Annotated[
        str, typer.Option(help="A transformer block, a whole DiT of patch size 2, or both.")
    ] = "block,model",
    widths: Annotated[str, typer.Option(help="Published sizes: S, B, L, XL.")] = "S,XL",
    sizes: Annotated[str, typer.Option(help="Numbers of tokens; perfect squares.")] = "256,1024,4096,16384",
    mode: Annotated[
        str, typer.Option(help="A forward pass, or forward and backward without an optimiser.")
    ] = "forward,training",
    mediators: Annotated[str, typer.Option(help="Numbers of mediators; perfect squares.")] = "4,16,64",
    rounds: Annotated[int, typer.Option(help="Timings per variant; the variants take turns.")] = 9,
    batch: Annotated[int, typer.Option(help="Batch size of one call.")] = 1,
    device: Device = "auto",
    dtype: FastestDtype = "auto",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for mediator.json and mediator.png.")] = Path("outputs/bench"),
    resume: Resume = False,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Minutes; sizes that would take longer are skipped, costly ones get fewer rounds."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Time mediator attention against softmax attention, and find the number of tokens from which it pays off.

    Each comparison reports the time ratio, counted GFLOPs and peak memory of a call. Sizes that do not fit in memory
    are skipped. Results are written after every round, so you can interrupt at any time and resume with --resume.
    """
    check_outputs(json, out, folder=True)
    with bad_input():
        from diffattn.benchmarks.mediator_report import plot, table
        from diffattn.benchmarks.mediators import MediatorBenchmark, MediatorBenchmarkConfig

        config = MediatorBenchmarkConfig(
            what=_list(what, "what"), widths=_list(widths, "widths"), sizes=_list(sizes, "sizes", int),
            modes=_list(mode, "mode"), mediators=_list(mediators, "mediators", int), rounds=rounds, batch=batch,
            device=device, dtype=dtype, threads=threads,
        )  # fmt: skip
        benchmark = MediatorBenchmark(config, out, resume=resume)
    results = benchmark.run(time_budget=_seconds(time_budget), say=_say)
    write_json(json, results)
    stdout.print(table(results), markup=False)
    try:
        plot(results, out / "mediator.png")
    except ValueError as error:
        stdout.print(f"no plot: {error}", markup=False)
    _check_finished(benchmark.is_complete)


@app.command("thresholds")
def thresholds(
    device: Device = "auto",
    dtype: FastestDtype = "auto",
    time_budget: Annotated[
        float | None,
        typer.Option(help="Without --model: minutes; grids that would take longer are skipped.", show_default="1.7"),
    ] = None,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="Overwrite the table inside the package (for maintainers).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file instead. [default: your thresholds file]")
    ] = None,
    json: JsonFile = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead, fill the cache of `diffattn.patch` for this model: name, folder or hub id."),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="With --model: side lengths of its pictures. [default: the model's own]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="With --model: the preset that is timed.", show_default="balanced")
    ] = None,
) -> None:
    """Measure the number of tokens from which agents beat exact attention on this machine; diffattn then uses it.

    Agents that were not faster at any size measured keep the package's number of tokens, unless that was measured too.

    With --model, time every kind of attention call of one model instead, as the first run of `diffattn.patch` does.
    """
    check_outputs(json, out)
    if model is not None:
        if shipped:
            fail("--model fills this machine's cache; it cannot be combined with --shipped")
        if time_budget is not None:
            fail(f"--time-budget {time_budget:g} applies to the measurement without --model")
        with bad_input():
            sides = None if sizes is None else _list(sizes, "sizes", int)
        _fill_cache(model, sides, preset or "balanced", (device, dtype), out, json)
        return
    for option, value in {"--sizes": sizes, "--preset": preset}.items():
        if value is not None:
            fail(f"{option} {value!r} applies to a model: give --model too")
    with bad_input():
        from diffattn.benchmarks.thresholds import lines_from, measure_thresholds, save_thresholds
        from diffattn.machine import resolve
        from diffattn.methods.thresholds import read_thresholds, shipped_file, user_file

        if shipped and out:
            raise ValueError("--shipped and --out are mutually exclusive")
        path = shipped_file() if shipped else out or user_file()
        if path.is_file():
            read_thresholds(path)
        found_device, found_dtype = resolve(device, dtype)
    check_writable(path)
    minutes = BUDGET if time_budget is None else time_budget
    results = measure_thresholds(found_device, found_dtype, time_budget=_seconds(minutes) or 0, say=_say)
    if not results:
        fail(f"--time-budget must be enough minutes for the smallest grid, got {minutes:g}")
    measured = save_thresholds(path, found_device, found_dtype, results)
    row = read_thresholds(path)[found_device.type]
    write_json(json, {"file": str(path), "device": found_device.type, "thresholds": row, "measured": measured})
    for line in lines_from(results, row):
        _say(line)
    stdout.print(f"written to {path}", markup=False)


def _fill_cache(
    model: str,
    sizes: tuple[int, ...] | None,
    preset: str,
    where: tuple[str, str],  # device and dtype
    out: Path | None,
    json: Path | None,
) -> None:
    with loading(model), bad_input():
        from diffattn.benchmarks.decisions import fill_cache
        from diffattn.drawing.classes import draws_classes
        from diffattn.drawing.draw import generate, prepare
        from diffattn.drawing.loading import load_pipeline
        from diffattn.drawing.request import UNPATCHED, Request
        from diffattn.machine import resolve
        from diffattn.patching.decision_cache import user_cache

        found_device, found_dtype = resolve(*where)
        pipe: Any = load_pipeline(model, found_dtype).to(found_device)
        pipe.set_progress_bar_config(disable=True)
        subject, path = "0" if draws_classes(pipe) else "", out or user_cache()

        def draw(size: int | None) -> list[Any]:
            asked = Request(model, subject, method=UNPATCHED, steps=FEW_STEPS, width=size, height=size)
            return list(generate(pipe, prepare(pipe, asked)[0]))

        results = fill_cache(pipe, path, draw, sizes=sizes, preset=preset, say=_say)
    write_json(json, {"file": str(path), "sizes": results})
    stdout.print(f"written to {path}", markup=False)


def _check_finished(is_complete: bool) -> None:
    if not is_complete:
        stdout.print("time ran out before everything was measured; continue with --resume")
        raise typer.Exit(NOT_FINISHED)


def _say(line: str) -> None:
    stdout.print(line, markup=False)


def _list(text: str, option: str, kind: Callable[[str], T] = str) -> tuple[T, ...]:
    """The items of a comma-separated option."""
    try:
        return tuple(kind(item.strip()) for item in text.split(",") if item.strip())
    except ValueError:
        raise ValueError(f"--{option} takes numbers separated by commas, got {text!r}") from None


def _seconds(minutes: float | None) -> float | None:
    if minutes is not None and not minutes > 0:
        fail(f"--time-budget must be above 0 minutes, got {minutes}")
    return None if minutes is None else 60 * minutes
