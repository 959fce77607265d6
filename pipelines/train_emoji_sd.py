"""Train `emoji-sd`, a small Stable Diffusion that draws emoji from their names, from scratch.

    python pipelines/train_emoji_sd.py train --data noto-emoji-512.zip --preset cpu --work outputs/emoji-sd
    python pipelines/train_emoji_sd.py evaluate --data noto-emoji-512.zip --preset cpu

Stages: autoencoder → tokenizer → UNet and text encoder on small latents → the same on large latents → export.
The same command again goes on where a killed run stopped. `--dry-run` prints the plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from emoji_sd.data import Pictures, load_pictures, split_names
from emoji_sd.denoiser import Denoiser, build_unet, denoiser_loss
from emoji_sd.evaluate import draw, grid, name_figures, vae_figures
from emoji_sd.export import export
from emoji_sd.loop import LoopConfig, Progress, atomic_save, train
from emoji_sd.presets import PRESETS, Preset, Stage
from emoji_sd.text import build_text_encoder, build_tokenizer, tokenize
from emoji_sd.vae import VaeTrainer, build_vae, encode, normalise, vae_loss
from torch import Tensor, nn
from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Job:
    preset: Preset
    work: Path  # checkpoints, latents, logs of this run
    out: Path  # the exported model
    device: str
    seed: int
    steps: int | None  # per stage, instead of minutes
    show_minutes: float
    save_minutes: float

    def loop(self, batch: int, lr: float, minutes: float, final_lr: float, ema: float) -> LoopConfig:
        budget = {"steps": self.steps} if self.steps else {"minutes": minutes}
        return LoopConfig(
            batch=batch, lr=lr, final_lr=final_lr, ema=ema, seed=self.seed, device=self.device,
            show_every=60 * self.show_minutes, save_every=60 * self.save_minutes, **budget,
        )  # fmt: skip

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, memory_format=torch.channels_last)


def train_vae(job: Job, pictures: Pictures) -> AutoencoderKL:
    """→ the EMA autoencoder, in eval mode."""
    p = job.preset
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        model = job.place(VaeTrainer(build_vae(p.vae_channels, p.vae_layers, p.size)))
    cfg = job.loop(p.vae_pixels // p.vae_crops[0] ** 2, p.vae_lr, p.vae_minutes, 0.02, 0.998)
    loss = vae_loss(pictures, p.vae_crops, p.vae_pixels, job.seed, job.device)
    ema, _ = train("vae", model, loss, cfg, job.work / "vae.pt")
    return ema.vae.eval()


def cached_latents(job: Job, vae: AutoencoderKL, pictures: Pictures, latent: int) -> Tensor:
    """Latents of every picture [N, 4, latent, latent], as the autoencoder was trained."""
    path = job.work / f"latents-{latent}.pt"
    if not path.exists():
        atomic_save(encode(vae, pictures.images, 8 * latent, job.device)[0], path)
    return torch.load(path, weights_only=True)


def normalised_latents(job: Job, vae: AutoencoderKL, pictures: Pictures) -> dict[int, Tensor]:
    """Latents for every stage with mean 0 and deviation 1 per channel; the autoencoder is changed to give them."""
    raw = {s.latent: cached_latents(job, vae, pictures, s.latent) for s in job.preset.stages}
    std, mean = torch.std_mean(raw[job.preset.size // 8], dim=(0, 2, 3))
    normalise(vae, mean, std)
    return {side: (z - mean[:, None, None]) / std[:, None, None] for side, z in raw.items()}


def train_denoiser(job: Job, vae: AutoencoderKL, pictures: Pictures, trained: list[int]) -> Progress:
    """Every stage starts from the EMA weights of the one before. → progress of the last stage"""
    p = job.preset
    subset = pictures.select(trained)
    tokenizer = build_tokenizer(subset.names, p.vocab)
    ids, empty = tokenize(tokenizer, subset.names), tokenize(tokenizer, [""])[0]
    latents = normalised_latents(job, vae, subset)
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        unet = build_unet(p.unet_channels, p.unet_heads, p.text_width, p.size // 8)
        model = job.place(Denoiser(unet, build_text_encoder(tokenizer, p.text_width, 2)))
    for stage in p.stages:
        cfg = job.loop(stage.batch, stage.lr, stage.minutes, stage.final_lr, stage.ema)
        loss = denoiser_loss(latents[stage.latent], ids, empty, stage.batch, job.seed, job.device)
        show = _shower(job, vae, tokenizer, stage, subset)
        model, progress = train(f"unet {stage.latent}", model, loss, cfg, job.work / f"unet-{stage.latent}.pt", show)
        model.requires_grad_(True)
    show(model, progress)
    return progress


def _shower(
    job: Job, vae: AutoencoderKL, tokenizer: CLIPTokenizer, stage: Stage, subset: Pictures
) -> Callable[[nn.Module, Progress], None]:
    """Export the EMA weights and draw a few trained names."""

    def show(ema: nn.Module, progress: Progress) -> None:
        export(ema, vae, tokenizer, job.out, stage.latent)
        pipe = StableDiffusionPipeline.from_pretrained(job.out)
        index = list(range(0, len(subset), max(len(subset) // 16, 1)))[:16]
        few = subset.select(index)
        drawn = draw(pipe, few.names, 20, 2.5, 0)
        grid(few.images, drawn, few.names, job.work / f"grid-{stage.latent}-{progress.step:06d}.png")

    return show


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
    return PRESETS[name] if minutes is None else PRESETS[name].scaled(minutes)


@app.command("train")
def train_command(
    data: Data,
    work: Annotated[
        Path, typer.Option(help="Folder of checkpoints and sample grids; an unfinished run there goes on.")
    ],
    preset: PresetName = "cpu",
    out: Out = Path("diffattn/assets/emoji-sd"),
    minutes: Annotated[float | None, typer.Option(help="Total budget in minutes, shared as in the preset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget of every stage in steps, instead of minutes.")] = None,
    show_minutes: Annotated[float, typer.Option(help="Minutes between exports with a sample grid.")] = 15,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0: every step.")] = 3,
    device: Device = "cpu",
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train every stage, or go on with what is unfinished, and export the pipeline."""
    job = Job(choose_preset(preset, minutes), work, out, device, seed, steps, show_minutes, save_minutes)
    typer.echo(json.dumps({"data": str(data), **{k: str(v) for k, v in vars(job).items()}}, indent=2))
    if dry_run:
        return
    pictures = load_pictures(data, job.preset.size)
    trained, _ = split_names(len(pictures), job.preset.every, job.preset.keep)
    vae = train_vae(job, pictures)
    train_denoiser(job, vae, pictures, trained)


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
