"""Train `emoji-sd`, a small Stable Diffusion that draws emoji from their names, from scratch.

    python pipelines/train_emoji_sd.py train --data noto-emoji-512.zip --preset cpu --work outputs/emoji-sd
    python pipelines/train_emoji_sd.py evaluate --data noto-emoji-512.zip --preset cpu

Stages: autoencoder → tokenizer → UNet and text encoder on small latents → the same on large latents → export.
The same command again goes on where a killed run stopped. `--dry-run` prints the plan.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from diffusers import StableDiffusionPipeline
from emoji_sd.data import load_pictures, split_names
from emoji_sd.evaluate import draw, grid, name_figures, vae_figures
from emoji_sd.precision import training_dtype
from emoji_sd.presets import PRESETS, Preset
from emoji_sd.stages import Job, train_all
from emoji_sd.start import load_start

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Data = Annotated[Path, typer.Option(help="Zip of captioned pictures (imagefolder layout).", exists=True)]
PresetName = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
Out = Annotated[Path, typer.Option(help="Folder of the exported model.")]
Samples = Annotated[Path, typer.Option(help="Folder of the sample grids.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, shuffles and noise.")]


def choose_preset(name: str, minutes: float | None) -> Preset:
    if name not in PRESETS:
        raise typer.BadParameter(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    try:
        return PRESETS[name] if minutes is None else PRESETS[name].scaled(minutes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("train")
def train_command(
    data: Data,
    work: Annotated[
        Path, typer.Option(help="Folder of checkpoints and sample grids; an unfinished run there goes on.")
    ],
    preset: PresetName = "cpu",
    start: Annotated[
        Path | None,
        typer.Option(help="Begin from this exported pipeline; its encoder and so its latents stay as they are."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the exported model.  [default: WORK/model]")] = None,
    minutes: Annotated[float | None, typer.Option(help="Total budget in minutes, shared as in the preset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget of every stage in steps, instead of the preset's.")] = None,
    show_minutes: Annotated[float, typer.Option(help="Minutes between exports with a sample grid.")] = 15,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0: every step.")] = 3,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the networks' products: float32, bfloat16; auto: bfloat16 where the device has it.")
    ] = "auto",
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train every stage, or go on with what is unfinished, and export the pipeline."""
    sizes = choose_preset(preset, minutes)
    try:
        precision = training_dtype(dtype, device)
        parts = load_start(start, sizes) if start else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    out = out or work / "model"
    job = Job(sizes, parts, work, out, device, precision, seed, steps, show_minutes, save_minutes)
    plan = {"data": data, **vars(job), "start": start}
    typer.echo(json.dumps({k: str(v) for k, v in plan.items()}, indent=2))
    if dry_run:
        return
    pictures = load_pictures(data, job.preset.size)
    trained, _ = split_names(len(pictures), job.preset.every, job.preset.keep)
    train_all(job, pictures, trained)


@app.command("evaluate")
def evaluate_command(
    data: Data,
    preset: PresetName = "cpu",
    model: Out = Path("diffattn/assets/emoji-sd"),
    samples: Samples = Path("samples/emoji-sd"),
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.5,
    device: Device = "cpu",
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Draw only this many trained names, evenly spread.")] = None,
    vae_pictures: Annotated[int, typer.Option(help="How many pictures the autoencoder is tried on.")] = 1609,
    write: Annotated[bool, typer.Option(help="Write figures.json and the grids.")] = True,
) -> None:
    """Draw every trained name, find the nearest picture, write `figures.json` and the grids."""
    p = choose_preset(preset, None)
    pictures = load_pictures(data, p.size)
    trained, held_out = split_names(len(pictures), p.every, p.keep)
    pipe = StableDiffusionPipeline.from_pretrained(model).to(device)
    if limit:
        trained = trained[:: max(len(trained) // limit, 1)]
    start = time.monotonic()
    drawn = draw(pipe, [pictures.names[i] for i in trained], steps, guidance, seed)
    figures = {
        "preset": preset, "size": drawn.shape[-1], "steps": steps, "guidance": guidance, "seed": seed,
        "sampler": type(pipe.scheduler).__name__,
        "seconds_per_picture": round((time.monotonic() - start) / len(trained), 2),
        **name_figures(drawn, pictures, trained),
    }  # fmt: skip
    if vae_pictures:
        figures |= vae_figures(pipe.vae, pictures, vae_pictures, device)
    typer.echo(json.dumps(figures, indent=2))
    if write:
        few = list(range(0, len(trained), max(len(trained) // 32, 1)))[:32]
        grid(pictures.images[[trained[i] for i in few]], drawn[few], [pictures.names[trained[i]] for i in few],
             samples / "grid.png")  # fmt: skip
        other = held_out[:: max(len(held_out) // 16, 1)][:16]
        names = [pictures.names[i] for i in other]
        grid(pictures.images[other], draw(pipe, names, steps, guidance, seed), names, samples / "heldout.png")
        (model / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
