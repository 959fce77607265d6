"""Export the checkpoints of an unfinished (or finished) run, even while it is running."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from .denoiser import Denoiser
from .export import export
from .stages import DECODER, Job, build_denoiser, unet_files


def export_snapshot(job: Job) -> str:
    """Write the averaged weights of the newest checkpoints to `job.out`. → which step of which stage they are

    Raises:
        ValueError: nothing to export yet.
    """
    tokenizer = _tokenizer(job)
    vae = _autoencoder(job)
    model, latent, what = _denoiser(job, tokenizer)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    export(model, vae, tokenizer, job.out, latent)
    return what


def _tokenizer(job: Job) -> CLIPTokenizer:
    if job.start is not None:
        return job.start.tokenizer
    if not (job.work / "tokenizer").is_dir():
        raise ValueError(f"{job.work} holds no tokenizer: a run without --start writes it after the autoencoder")
    return CLIPTokenizer.from_pretrained(job.work / "tokenizer")


def _autoencoder(job: Job) -> AutoencoderKL:
    """The finished one, else the decoder's checkpoint, else the start's."""
    if (job.work / "vae").is_dir():
        return AutoencoderKL.from_pretrained(job.work / "vae").eval()
    if job.start is None:
        raise ValueError(f"{job.work} holds no finished autoencoder")
    if (job.work / DECODER).exists():
        job.start.vae.load_state_dict(torch.load(job.work / DECODER, map_location="cpu", weights_only=True)["ema"])
    return job.start.vae.eval()


def _denoiser(job: Job, tokenizer: CLIPTokenizer) -> tuple[Denoiser, int, str]:
    """→ averaged weights of the last stage that has any, the side of its latents, its name and step"""
    model = build_denoiser(job, tokenizer)
    for stage, file in reversed(list(zip(job.preset.stages, unet_files(job.preset), strict=True))):
        path = job.work / file
        if path.exists():
            state = torch.load(path, map_location=job.device, weights_only=True)
            model.load_state_dict(state["ema"])
            return (
                model.eval(),
                stage.latent,
                f"step {state['progress']['step']} on {stage.latent}×{stage.latent} latents",
            )
    if job.start is None:
        raise ValueError(f"{job.work} holds no checkpoint of the UNet")
    return model.eval(), job.preset.stages[-1].latent, "UNet and text encoder as they started"
