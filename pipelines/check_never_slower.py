"""Checks that a patch makes no step slower, whatever the model and the size of the picture.

    python pipelines/check_never_slower.py --models sd15,sdxl,sd35m,emoji-sd --out outputs/never-slower

Five variants of one step take turns: exact attention; exact attention again, whose ratio shows the noise; the first
and the second step of a scheduler's run, patched, when it is known from earlier runs which way is faster; and the first
step of a patch that knows nothing and times both ways. In the second step a patch reuses what it found in the first; in
every eighth step it looks again, which costs as much as the first step of a run. From these follow the time of a whole
run, and that of the first run on a machine. Short steps are timed in more rounds than long ones, until their times add
up. Rounds are kept after each of them; start again with the same arguments to resume.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import diffattn
from diffattn.architectures.denoisers import denoisers_of
from diffattn.architectures.processor import RENEWED_EVERY
from diffattn.drawing.loading import embedded_models
from diffattn.files import read_json, write_json
from diffattn.machine import cpu_threads, describe_machine, dtype_name, resolve, where
from diffattn.measure.denoiser_inputs import make_denoiser_inputs
from diffattn.measure.interleave import Spread, Timings, interleave
from diffattn.measure.memory import peak_mib
from diffattn.measure.models import MODELS
from diffattn.noise_level import NUM_TRAIN_TIMESTEPS
from diffattn.tables import markdown_table

EXACT, CONTROL, START, LATER, FIRST = "exact", "exact again", "first step", "second step", "first step of all"
RUN, FIRST_RUN = "patched run", "first run"
SCHEDULED = 20  # time steps of the run that the timed ones are the first of
MOST_ROUNDS = 100
PIXELS_PER_LATENT = 8
PIXELS_PER_TOKEN = 64  # of an embedded model, at its lowest resolution


@dataclass(frozen=True)
class Step:
    """One step of a denoiser, and where its patches keep what they find."""

    model: nn.Module
    inputs: tuple[Any, Any]
    device: torch.device
    folder: Path
    scheduler: Any  # found by the patch, which only reuses what it finds where it knows the run

    def at(self, step: int) -> tuple[Any, Any]:
        """The arguments of a step of the run, with its time step as pipelines pass it."""
        args, kwargs = self.inputs
        time = self.scheduler.timesteps[step]
        if _is_unet(self.model):
            return (args[0], time, *args[2:]), kwargs
        if "timestep" not in kwargs:
            return self.inputs  # a time of its own, by which the patch cannot know the run
        given = kwargs["timestep"]
        times = time.expand(len(given))
        return args, kwargs | {"timestep": times if given.max() > 1 else (times / NUM_TRAIN_TIMESTEPS).to(given.dtype)}

    def call(self, step: int = 1) -> None:
        args, kwargs = self.at(step)
        self.model(*args, **kwargs)

    def calls(self) -> dict[str, Callable[[], None]]:
        """What is timed of every variant."""
        return {name: partial(self.call, 2 if name == LATER else 1) for name in (EXACT, CONTROL, START, LATER, FIRST)}

    @contextmanager
    def around(self, variant: str) -> Iterator[None]:
        """The patch of a variant, if it has one. What is done once per run is not timed, except in a first call."""
        if variant in (EXACT, CONTROL):
            yield
            return
        cache = self.folder / "known.json"
        if variant == FIRST:
            cache = self.folder / "new.json"
            cache.unlink(missing_ok=True)
        with diffattn.patch(self.model, calibrate=cache) as patch:
            patch.quiet()
            if variant != FIRST:
                args, kwargs = self.at(0)
                patch.begin_run(*args, **kwargs)
            if variant == LATER:
                self.call()
            yield

    def accelerated(self) -> tuple[int, int]:
        """Layers that a patch accelerates, and those that it could; what it finds is kept for later patches."""
        with diffattn.patch(self.model, calibrate=self.folder / "known.json") as patch:
            patch.quiet()
            self.call()
            return patch.report().layers_accelerated, patch.report().layers_patched

    def peaks(self) -> dict[str, float | None]:
        """The peak memory of a call, exact and patched, in MiB."""
        found = {}
        for variant in (EXACT, START):
            with self.around(variant):
                found[variant] = peak_mib(self.call, self.device)
        return found


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(MODELS)}, or embedded ones.")],
    sizes: Annotated[str, typer.Option(help="Comma-separated sides in pixels.")] = "256,512,768,1024,1536",
    rounds: Annotated[int, typer.Option(help="Timings per variant, at least.", min=1)] = 5,
    seconds: Annotated[
        float,
        typer.Option(help=f"More rounds, up to {MOST_ROUNDS}, until the timings of a size add up to this.", min=0),
    ] = 20.0,
    steps: Annotated[int, typer.Option(help="Steps of the first run.", min=1)] = 20,
    batch: Annotated[int, typer.Option(help="Batch size of a step.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/never-slower"),
) -> None:
    """Time the steps, and write never-slower.json and never-slower.md."""
    try:
        where_to, kind = resolve(device, dtype)
        names, sides = models.split(","), [int(size) for size in sizes.split(",")]
        _check(names, sides)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with cpu_threads(threads), torch.no_grad():
        settings = {"batch": batch, "steps": steps, "device": str(where_to), "dtype": dtype_name(kind)}
        results = _earlier(out / "never-slower.json", {"machine": describe_machine(where_to), "settings": settings})
        for name in names:
            model = _build(name, where_to, kind)
            for size in sides:
                _measure(results, name, model, size, (rounds, seconds), where_to, out)
            del model
    (out / "never-slower.md").write_text(text := table(results))
    typer.echo(text)


def _check(names: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise `ValueError` for a model or a size that cannot be measured, before anything is."""
    for name in names:
        if name not in (*MODELS, *embedded_models()):
            raise ValueError(f"unknown model {name!r}; allowed: {', '.join((*MODELS, *embedded_models()))}")
        for size in sizes:
            if name in MODELS:
                MODELS[name].shape(size)  # raises
            elif size < PIXELS_PER_TOKEN or size % PIXELS_PER_TOKEN:
                raise ValueError(f"sizes are multiples of {PIXELS_PER_TOKEN} pixels, got {size}")


def _earlier(path: Path, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, if they were made under the same conditions.

    Raises:
        typer.BadParameter: they were not.
    """
    if not path.is_file():
        return {**conditions, "results": []}
    found = read_json(path)
    keys = ("cpu", "gpu", "threads")
    same = all(found["machine"].get(key) == conditions["machine"].get(key) for key in keys)
    if not same or found["settings"] != conditions["settings"]:
        raise typer.BadParameter(
            f"{str(path)!r} was made on another machine or with other settings: choose another --out"
        )
    return found


def _build(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if name in MODELS:
        return MODELS[name].build(device, dtype, shortened=MODELS[name].shortened(device, dtype))
    pipe = diffattn.load_demo(name).to(device, dtype)
    return next(iter(denoisers_of(pipe).values()))


def _measure(
    results: dict[str, Any],
    name: str,
    model: nn.Module,
    size: int,
    at_least: tuple[int, float],
    device: torch.device,
    out: Path,
) -> None:
    """All variants of one model at one size, unless they have been measured in enough rounds and seconds."""
    batch = results["settings"]["batch"]
    earlier = next((e for e in results["results"] if (e["model"], e["size"]) == (name, size)), None)
    done = [] if earlier is None else earlier["rounds"]
    if _enough(done, *at_least):
        return
    side = size // PIXELS_PER_LATENT
    inputs = (
        MODELS[name].inputs(model, size, batch) if name in MODELS else make_denoiser_inputs(model, side, side, batch)
    )
    with tempfile.TemporaryDirectory() as folder:
        step = Step(model, inputs, device, Path(folder), _scheduler(model))
        layers = step.accelerated()
        about = {"model": name, "size": size, "layers": layers, "peak_mib": step.peaks()}

        def keep(timings: Timings) -> None:
            others = [e for e in results["results"] if (e["model"], e["size"]) != (name, size)]
            results["results"] = [*others, about | {"rounds": [dict(r) for r in timings.rounds]}]
            write_json(out / "never-slower.json", results)
            typer.echo(f"{name} {size} px: round {len(timings.rounds)}")

        calls = step.calls()
        while not _enough(done, *at_least):
            more = interleave(calls, len(done) + 1, 0, device, around=step.around, finished=done, on_round=keep)
            done = list(more.rounds)


def _scheduler(model: nn.Module) -> Any:
    """A scheduler of the kind that the model is used with, prepared for a run."""
    scheduler = DDIMScheduler() if _is_unet(model) else FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(SCHEDULED)
    return scheduler


def _is_unet(model: nn.Module) -> bool:
    return "UNet" in type(model).__name__


def _enough(done: Sequence[Mapping[str, float]], rounds: int, seconds: float) -> bool:
    return len(done) >= rounds and (len(done) >= MOST_ROUNDS or sum(sum(r.values()) for r in done) >= seconds)


def ratios(entry: Mapping[str, Any], steps: int) -> dict[str, Spread]:
    """Time over that of exact attention in the same round: of exact attention again, of a patched run of so many steps,
    and of the first such run."""
    rounds, looks = entry["rounds"], -(-steps // RENEWED_EVERY)

    def run(r: Mapping[str, float], first: float) -> float:
        return (first + (looks - 1) * r[START] + (steps - looks) * r[LATER]) / (steps * r[EXACT])

    return {
        CONTROL: Spread.of([r[CONTROL] / r[EXACT] for r in rounds]),
        RUN: Spread.of([run(r, r[START]) for r in rounds]),
        FIRST_RUN: Spread.of([run(r, r[FIRST]) for r in rounds]),
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    settings, rows = results["settings"], []
    for entry in results["results"]:
        found, peaks = ratios(entry, settings["steps"]), entry["peak_mib"]
        memory = f"{peaks[START] / peaks[EXACT]:.2f}" if peaks[EXACT] else ""
        spreads = (f"{s.median:.3f} ({s.q25:.3f}–{s.q75:.3f})" for s in found.values())
        layers = "{} of {}".format(*entry["layers"])
        rows.append((entry["model"], f"{entry['size']}", layers, *spreads, memory, f"{len(entry['rounds'])}"))
    machine, head = results["machine"], ("model", "px", "layers", CONTROL, RUN, FIRST_RUN, "memory", "rounds")
    return (
        f"{where(machine)}, {settings['dtype']}, batch {settings['batch']}, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}. Time of {settings['steps']} steps over that with exact attention, median and "
        f"middle half.\n\n{markdown_table(head, rows)}\n"
    )


if __name__ == "__main__":
    typer.run(main)
