"""Begin from an exported pipeline instead of from fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .denoiser import build_unet
from .grow import add_level, can_grow
from .presets import Preset


@dataclass(frozen=True)
class Start:
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL


def load_start(folder: Path, preset: Preset) -> Start:
    """The parts of a `StableDiffusionPipeline` folder, in float32; a UNet that lacks only the deepest level gets it.

    Raises:
        ValueError: no such pipeline, or one whose widths differ from the preset's.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no exported pipeline: it has no model_index.json")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    unet = pipe.unet.float()
    if can_grow(tuple(unet.config["block_out_channels"]), preset.unet_channels):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            larger = build_unet(preset.unet_channels, preset.unet_heads, preset.text_width, preset.size // 8)
        unet = add_level(unet, larger)
    start = Start(unet, pipe.text_encoder.float(), pipe.tokenizer, pipe.vae.float())
    for what, found, wanted in (
        ("UNet channels", tuple(start.unet.config["block_out_channels"]), preset.unet_channels),
        ("text width", start.text.config.hidden_size, preset.text_width),
        ("autoencoder channels", tuple(start.vae.config["block_out_channels"]), preset.vae_channels),
        ("autoencoder layers", start.vae.config["layers_per_block"], preset.vae_layers),
    ):
        if found != wanted:
            raise ValueError(f"{folder} does not fit the preset: {what} {found} instead of {wanted}")
    return start
