"""The stages in their order: autoencoder → latents → tokenizer → UNet and text encoder on ever larger latents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from training_loop import Budget, LoopConfig, Progress, Show
from transformers import CLIPTokenizer

from diffattn.files import write_whole

from .data import Pictures, held_out_of_vae
from .denoiser import Denoiser, build_unet, denoiser_loss
from .evaluate import draw, grid
from .export import export
from .loop import Curves, checkpoint_names, train
from .precision import autocast
from .presets import Preset, Stage
from .start import Start
from .strided_keys import stride_keys
from .text import build_text_encoder, build_tokenizer, tokenize
from .vae import VaeTrainer, build_vae, decoder_loss, encode, freeze_encoder, normalise, vae_loss

M = TypeVar("M", bound=nn.Module)
DECODER = "decoder.pt"  # checkpoint of an autoencoder of which only the decoder is trained


def unet_files(preset: Preset) -> list[str]:
    return checkpoint_names("unet", [stage.latent for stage in preset.stages])


@dataclass(frozen=True)
class Job:
    preset: Preset
    start: Start | None  # None: fresh weights
    work: Path  # checkpoints, latents, sample grids of this run
    out: Path  # the exported model
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # what networks compute in
    seed: int = 0
    steps: int | None = None  # per stage, instead of the preset's budgets
    show_minutes: float = 15
    save_minutes: float = 3

    def loop(self, budget: Budget, batch: int) -> LoopConfig:
        return LoopConfig(
            Budget(steps=self.steps) if self.steps else budget, batch, self.seed, self.device, clip=1.0,
            show_every=60 * self.show_minutes, save_every=60 * self.save_minutes,
        )  # fmt: skip

    def place(self, module: M) -> M:
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def train_all(job: Job, pictures: Pictures, trained: list[int]) -> None:
    train_denoiser(job, train_vae(job, pictures), pictures.select(trained))


def train_vae(job: Job, pictures: Pictures) -> AutoencoderKL:
    """→ the EMA autoencoder, in eval mode. From a start only its decoder is trained."""
    p = job.preset
    kept, _ = held_out_of_vae(len(pictures), p.vae_held_out)
    cfg = job.loop(p.vae_budget, p.vae_pixels // p.vae_crops[0] ** 2)
    curves = Curves(p.vae_lr, ema=0.998, final_ema=0.999, muon=p.vae_muon)
    if job.start is None:
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            model = job.place(VaeTrainer(build_vae(p.vae_channels, p.vae_layers, p.size)))
        loss = vae_loss(pictures.select(kept), p.vae_crops, p.vae_pixels, job.seed, job.device, job.dtype)
        return train("vae", model, loss, curves, cfg, job.work / "vae.pt")[0].vae.eval()
    vae = job.place(job.start.vae)
    latents = cached_latents(job, vae, pictures, p.size // 8)
    freeze_encoder(vae)
    subset = pictures.select(kept)
    loss = decoder_loss(subset, latents[kept], p.vae_crops, p.vae_pixels, job.seed, job.device, job.dtype)
    return train("decoder", vae, loss, curves, cfg, job.work / DECODER)[0].eval()


def cached_latents(job: Job, vae: AutoencoderKL, pictures: Pictures, latent: int) -> Tensor:
    """Latents of every picture [N, 4, latent, latent], as the autoencoder gives them."""
    path = job.work / f"latents-{latent}-of-{len(pictures)}.pt"
    if not path.exists():
        write_whole(path, partial(torch.save, encode(vae, pictures.images, 8 * latent, job.device)[0]))
    return torch.load(path, weights_only=True)


def stage_latents(job: Job, vae: AutoencoderKL, pictures: Pictures) -> dict[int, Tensor]:
    """Latents for every stage with mean 0 and deviation 1 per channel; a fresh autoencoder is changed to give them,
    one from a start gives them already."""
    raw = {s.latent: cached_latents(job, vae, pictures, s.latent) for s in job.preset.stages}
    if job.start is not None:
        return raw
    std, mean = torch.std_mean(raw[job.preset.size // 8], dim=(0, 2, 3))
    normalise(vae, mean, std)
    return {side: (z - mean[:, None, None]) / std[:, None, None] for side, z in raw.items()}


def build_denoiser(job: Job, tokenizer: CLIPTokenizer) -> Denoiser:
    if job.start is not None:
        return job.place(Denoiser(job.start.unet, job.start.text)).requires_grad_(True).train()
    p = job.preset
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        unet = build_unet(p.unet_channels, p.unet_heads, p.text_width, p.size // 8)
        return job.place(Denoiser(unet, build_text_encoder(tokenizer, p.text_width, 2)))


def train_denoiser(job: Job, vae: AutoencoderKL, pictures: Pictures) -> Progress:
    """Every stage starts from the EMA weights of the one before. → progress of the last stage"""
    tokenizer = job.start.tokenizer if job.start else build_tokenizer(pictures.names, job.preset.vocab)
    ids, empty = tokenize(tokenizer, pictures.names), tokenize(tokenizer, [""])[0]
    latents = stage_latents(job, vae, pictures)
    vae.save_pretrained(job.work / "vae")  # these two so that a checkpoint of the denoiser can be exported
    tokenizer.save_pretrained(job.work / "tokenizer")
    model, progress = build_denoiser(job, tokenizer), Progress()
    for number, (stage, file) in enumerate(zip(job.preset.stages, unet_files(job.preset), strict=True)):
        cfg = job.loop(stage.budget, stage.batch)
        stride_keys(model.unet, stage.key_strides)
        curves = Curves(stage.lr, final_lr=stage.final_lr, ema=stage.ema, final_ema=stage.final_ema, muon=stage.muon)
        loss = denoiser_loss(latents[stage.latent], ids, empty, stage, job.seed + number, job.device, job.dtype)
        show = _shower(job, vae, tokenizer, stage, pictures)
        model, progress = train(Path(file).stem, model, loss, curves, cfg, job.work / file, show)
        model.requires_grad_(True)
    _shower(job, vae, tokenizer, job.preset.stages[-1], pictures)(model, progress)
    return progress


def _shower(job: Job, vae: AutoencoderKL, tokenizer: CLIPTokenizer, stage: Stage, subset: Pictures) -> Show:
    """Export the EMA weights and draw a few trained names."""

    def show(ema: nn.Module, progress: Progress) -> None:
        assert isinstance(ema, Denoiser)
        export(ema, vae, tokenizer, job.out, stage.latent)
        pipe = StableDiffusionPipeline.from_pretrained(job.out).to(job.device)
        index = list(range(0, len(subset), max(len(subset) // 16, 1)))[:16]
        few = subset.select(index)
        with autocast(job.device, job.dtype):
            drawn = draw(pipe, few.names, steps=20, guidance=2.0, seed=0)
        grid(few.images, drawn, few.names, job.work / f"grid-{stage.latent}-{progress.step:06d}.png")

    return show
