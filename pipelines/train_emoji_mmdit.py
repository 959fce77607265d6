"""Train `emoji-mmdit`, a small Stable Diffusion 3 that draws emoji from their names.

    python pipelines/train_emoji_mmdit.py train --data noto-emoji-512.zip --work outputs/emoji-mmdit
    python pipelines/train_emoji_mmdit.py train --data noto-emoji-512.zip --work outputs/longer --preset cpu-512 \\
        --start diffattn/assets/emoji-mmdit
    python pipelines/train_emoji_mmdit.py evaluate --data noto-emoji-512.zip --model outputs/emoji-mmdit/model

Autoencoder, tokenizer and the text encoder's first weights are those of `emoji-sd`. MMDiT and text encoder are trained
together, on small latents first; every stage starts from the averaged weights of the one before.

Ctrl-C and SIGTERM save and stop; the same command resumes, also after a crash. `export` writes the averaged weights of
a run that is still going on. `train --start` begins from an exported model; `train --dry-run` prints the plan.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from diffusers import StableDiffusion3Pipeline
from emoji_mmdit.export import build_scheduler, export
from emoji_mmdit.presets import PRESETS, Preset
from emoji_mmdit.stages import Job, build_denoiser, load_newest, load_parts, train_all
from emoji_sd.artist import Artist, draw_names, spread
from emoji_sd.data import load_pictures, split_names
from emoji_sd.evaluate import Figures
from emoji_sd.precision import training_dtype
from train_emoji_sd import Data, Device, Dtype, PresetName, Seed, Steps, choose_out, option_errors

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Work = Annotated[Path, typer.Option(help="Folder of checkpoints and latents; an unfinished run is resumed.")]
Parts = Annotated[Path, typer.Option(help="Folder of the pipeline whose autoencoder and tokenizer are taken.")]
Start = Annotated[Path | None, typer.Option(help="Folder of an exported model to begin from.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the exported model.  [default: WORK/model]")]
EMOJI_SD = Path("diffattn/assets/emoji-sd")


def choose_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


@app.command("train")
def train_command(
    data: Data,
    work: Work,
    preset: PresetName = "cpu",
    parts: Parts = EMOJI_SD,
    start: Start = None,
    out: Out = None,
    steps: Steps = None,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0: every step.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train every stage, resuming unfinished ones, and export the pipeline."""
    with option_errors():
        sizes, precision = choose_preset(preset), training_dtype(dtype, device)
        job = Job(sizes, load_parts(parts), work, device, precision, seed, steps, start, save_minutes)
        build_denoiser(job)  # refuses a start that does not fit
        folder = choose_out(out, work, start)
    plan = {"data": data, "parts": parts, "out": folder, **{k: v for k, v in vars(job).items() if k != "parts"}}
    typer.echo(json.dumps({k: str(v) for k, v in plan.items()}, indent=2))
    if dry_run:
        return
    pictures = load_pictures(data, sizes.size)
    trained, _ = split_names(len(pictures), sizes.every, keep=True)
    model = train_all(job, pictures.select(trained))
    export(model, job.parts, folder, sizes.stages[-1].latent, sizes.shift)


@app.command("export")
def export_command(work: Work, preset: PresetName = "cpu", parts: Parts = EMOJI_SD, out: Out = None) -> None:
    """Export the averaged weights of the newest checkpoint, even while training is running."""
    with option_errors():
        job = Job(choose_preset(preset), load_parts(parts), work)
        model, stage, step = load_newest(job)
    folder = out or work / "model"
    export(model, job.parts, folder, stage.latent, job.preset.shift)
    typer.echo(f"{folder}: step {step} on {stage.latent}×{stage.latent} latents")


@app.command("evaluate")
def evaluate_command(
    data: Data,
    preset: PresetName = "cpu",
    model: Annotated[Path, typer.Option(help="Folder of an exported model.")] = Path("diffattn/assets/emoji-mmdit"),
    samples: Annotated[Path, typer.Option(help="Folder of the sample grids.")] = Path("samples/emoji-mmdit"),
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 16,
    guidance: Annotated[str, typer.Option(help="Guidance scale; of several (1.5,2,2.5) the best is found.")] = "1.5",
    shift: Annotated[float | None, typer.Option(help="Of the noise levels, instead of the model's own.")] = None,
    sweep_names: Annotated[int, typer.Option(help="How many names each of several guidance scales is tried on.")] = 20,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Draw only this many trained names, evenly spread.", min=1)] = None,
    write: Annotated[bool, typer.Option(help="Write figures.json and the grids.")] = True,
) -> None:
    """Draw every trained name, compare with the real pictures, write `figures.json` into the model, and the grids."""
    with option_errors():
        sizes, precision = choose_preset(preset), training_dtype(dtype, device)
        scales = [float(part) for part in guidance.split(",")]
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None).to(device)
    if shift is not None:
        pipe.scheduler = build_scheduler(shift)
    pictures = load_pictures(data, 8 * pipe.transformer.config["sample_size"])
    trained, held_out = split_names(len(pictures), sizes.every, keep=True)
    artist = Artist(pipe, pictures, steps, seed, precision)
    figures: Figures = {
        "preset": preset, "steps": steps, "shift": pipe.scheduler.config["shift"], "seed": seed,
        "dtype": str(precision).removeprefix("torch."),
    }  # fmt: skip
    figures |= draw_names(artist, spread(trained, limit), held_out, scales, sweep_names, samples if write else None)
    typer.echo(json.dumps(figures, indent=2))
    if write:
        (model / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
