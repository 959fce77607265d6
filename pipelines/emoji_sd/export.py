"""Write the trained parts as a diffusers `StableDiffusionPipeline` folder: fp16 files that load as fp32."""

from __future__ import annotations

import copy
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from saved_pipeline import swap_in
from transformers import CLIPTokenizer

from .denoiser import Denoiser, build_scheduler

KEPT = ("README.md", "figures.json")  # what an export leaves in place


def export(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, latent_size: int) -> None:
    swap_in(_pipeline(model, vae, tokenizer, latent_size), folder, ("text_encoder",), KEPT)


def _pipeline(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, latent_size: int
) -> StableDiffusionPipeline:
    unet = copy.deepcopy(model.unet).cpu().half()
    unet.register_to_config(sample_size=latent_size)
    return StableDiffusionPipeline(
        vae=copy.deepcopy(vae).cpu().half(),
        text_encoder=copy.deepcopy(model.text).cpu().half(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
