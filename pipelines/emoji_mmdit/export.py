"""Write the trained parts as a diffusers `StableDiffusion3Pipeline` folder: fp16 files that load as fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from saved_pipeline import swap_in

from .denoiser import Denoiser
from .stages import Parts

KEPT = ("README.md", "figures.json", "first_steps.json", "speed_quality.json", "reference.safetensors")
"""What an export leaves in place."""


def build_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """sigma = shift·t / (1 + (shift - 1)·t): above 1, more steps near noise (arXiv 2403.03206, equation 23)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def export(model: Denoiser, parts: Parts, folder: Path, side: int, shift: float) -> None:
    """`side`: of the latents that the model was trained on last, which become the pipeline's size."""
    swap_in(_pipeline(model, parts, side, shift), folder, ("text_encoder", "text_encoder_2"), KEPT)


def _pipeline(model: Denoiser, parts: Parts, side: int, shift: float) -> StableDiffusion3Pipeline:
    vae = copy.deepcopy(parts.vae).cpu().half()
    vae.register_to_config(shift_factor=0.0)  # this pipeline wants a number
    text = copy.deepcopy(model.text).cpu().half()
    return StableDiffusion3Pipeline(
        transformer=_resized(model.transformer, side),
        scheduler=build_scheduler(shift),
        vae=vae,
        text_encoder=text,
        tokenizer=parts.tokenizer,
        text_encoder_2=text,
        tokenizer_2=parts.tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


def _resized(trained: SD3Transformer2DModel, side: int) -> SD3Transformer2DModel:
    """A plain transformer for `side`×`side` latents with the weights and positions of `trained`."""
    config = dict(trained.config) | {"sample_size": side, "pos_embed_max_size": side}
    model: Any = SD3Transformer2DModel.from_config(config)
    model.load_state_dict(trained.state_dict())
    return model.half()
