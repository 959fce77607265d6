"""Train `emoji-sd`, a small Stable Diffusion that draws emoji from their names.

    python pipelines/train_emoji_sd.py train --data noto-emoji-512.zip --preset cpu --work outputs/emoji-sd
    python pipelines/train_emoji_sd.py evaluate --data noto-emoji-512.zip --preset cpu --model outputs/emoji-sd/model

Stages: autoencoder → tokenizer → UNet and text encoder on small latents → the same on large latents → export.
With `--start` everything begins from an exported pipeline, and of the autoencoder only the decoder is trained.

Ctrl-C and SIGTERM save and stop; the same command resumes, also after a crash. `export` writes the averaged
weights of a run that is still going on. `train --dry-run` prints the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from diffusers import StableDiffusionPipeline
from emoji_sd.artist import Artist, draw_names, spread
from emoji_sd.data import load_pictures, split_names
from emoji_sd.evaluate import Figures, vae_figures
from emoji_sd.precision import training_dtype
from emoji_sd.presets import PRESETS, Preset
from emoji_sd.snapshot import export_snapshot
from emoji_sd.stages import Job, train_all
from emoji_sd.start import load_start

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Data = Annotated[Path, typer.Option(help="Zip of captioned pictures (imagefolder layout).", exists=True)]
PresetName = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
Work = Annotated[Path, typer.Option(help="Folder of checkpoints and sample grids; an unfinished run is resumed.")]
Start = Annotated[
    Path | None,
    typer.Option(help="Start from this exported pipeline instead of fresh weights; its latents stay unchanged."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the exported model.  [default: WORK/model]")]
Model = Annotated[Path, typer.Option(help="Folder of an exported model.")]
Samples = Annotated[Path, typer.Option(help="Folder of the sample grids.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda.")]
Dtype = Annotated[
    str, typer.Option(help="What networks compute in: float32, bfloat16, or auto: bfloat16 where it is in hardware.")
]
Seed = Annotated[int, typer.Option(help="Seed of weights, shuffles and noise.")]
Minutes = Annotated[float | None, typer.Option(help="Total budget in minutes, shared as in the preset.")]
Steps = Annotated[int | None, typer.Option(help="Budget of every stage in steps, instead of the preset's.", min=1)]


@contextmanager
def option_errors() -> Iterator[None]:
    """A ValueError about what was asked for → one line that names it."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def choose_preset(name: str, minutes: float | None = None) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name] if minutes is None else PRESETS[name].scaled(minutes)


def choose_out(out: Path | None, work: Path, start: Path | None) -> Path:
    if out is not None and start is not None and out.resolve() == start.resolve():
        raise ValueError("--out is the --start folder: a run that is resumed needs the weights it began from")
    return out or work / "model"


@app.command("train")
def train_command(
    data: Data,
    work: Work,
    preset: PresetName = "cpu",
    start: Start = None,
    out: Out = None,
    minutes: Minutes = None,
    steps: Steps = None,
    show_minutes: Annotated[float, typer.Option(help="Minutes between exports with a sample grid.")] = 15,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0: every step.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train every stage, resuming unfinished ones, and export the pipeline."""
    with option_errors():
        sizes, folder = choose_preset(preset, minutes), choose_out(out, work, start)
        parts = load_start(start, sizes) if start else None
        precision = training_dtype(dtype, device)
    job = Job(sizes, parts, work, folder, device, precision, seed, steps, show_minutes, save_minutes)
    plan = {"data": data, **vars(job), "start": start}
    typer.echo(json.dumps({k: str(v) for k, v in plan.items()}, indent=2))
    if dry_run:
        return
    pictures = load_pictures(data, sizes.size)
    trained, _ = split_names(len(pictures), sizes.every, sizes.keep)
    train_all(job, pictures, trained)


@app.command("export")
def export_command(work: Work, preset: PresetName = "cpu", start: Start = None, out: Out = None) -> None:
    """Export the averaged weights of the newest checkpoints, even while training is running."""
    with option_errors():
        sizes, folder = choose_preset(preset), choose_out(out, work, start)
        parts = load_start(start, sizes) if start else None
        what = export_snapshot(Job(sizes, parts, work, folder))
    typer.echo(f"{folder}: {what}")


@app.command("evaluate")
def evaluate_command(
    data: Data,
    preset: PresetName = "cpu",
    model: Model = Path("diffattn/assets/emoji-sd"),
    samples: Samples = Path("samples/emoji-sd"),
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[str, typer.Option(help="Guidance scale; of several (1.5,2,2.5) the best is found.")] = "2.5",
    sweep_names: Annotated[int, typer.Option(help="How many names each of several guidance scales is tried on.")] = 20,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(help="Draw only this many trained names, evenly spread; 0: the autoencoder alone.")
    ] = None,
    vae_pictures: Annotated[
        int, typer.Option(help="How many pictures the autoencoder is tried on, apart from those it never saw; 0: none.")
    ] = 1609,
    write: Annotated[bool, typer.Option(help="Write figures.json and the grids.")] = True,
) -> None:
    """Draw every trained name, compare with the real pictures, write `figures.json` into the model, and the grids."""
    with option_errors():
        p, precision = choose_preset(preset), training_dtype(dtype, device)
        scales = [float(part) for part in guidance.split(",")]
    pictures = load_pictures(data, p.size)
    trained, held_out = split_names(len(pictures), p.every, p.keep)
    pipe = StableDiffusionPipeline.from_pretrained(model).to(device)
    artist = Artist(pipe, pictures, steps, seed, precision)
    figures: Figures = {"preset": preset, "steps": steps, "seed": seed, "dtype": str(precision).removeprefix("torch.")}
    if limit != 0:
        figures |= draw_names(artist, spread(trained, limit), held_out, scales, sweep_names, samples if write else None)
    if vae_pictures:
        figures |= vae_figures(pipe.vae, pictures, vae_pictures, p.vae_held_out, device)
    typer.echo(json.dumps(figures, indent=2))
    if write:
        (model / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
