"""Pipelines that fail like real ones: weights that are NaN, a VAE that overflows, a safety checker that blanks."""

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

SPOILT = "z"
"""The word that `spoil_word` makes a prompt go wrong by."""


def spoil_word(pipe: Any) -> None:
    """From now on pictures whose prompt has the word "z" come out NaN, and no others."""
    token = pipe.tokenizer(SPOILT).input_ids[1]
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[token] = torch.nan


def spoil_unet(pipe: Any, value: float) -> None:
    """One weight of the denoiser."""
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = value


def spoil_vae(pipe: Any, value: float) -> None:
    """One weight of the decoder's last layer: an infinite one gives pixels that would be clamped to white or black."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = value


def add_checker(pipe: Any, blanks: Image.Image | None = None, everything: bool = False) -> None:
    """Give a tiny Stable Diffusion pipeline a safety checker that blanks one picture, or all, or none."""
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    config = CLIPConfig(text_config=CLIPTextConfig(**small), vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        checker.special_care_embeds_weights.fill_(2)  # a cosine above the weight is a match
        checker.concept_embeds_weights.fill_(-2 if everything else 2)
        if blanks is not None:
            pixels = processor(blanks, return_tensors="pt").pixel_values
            checker.concept_embeds[0] = checker.visual_projection(checker.vision_model(pixels)[1])[0]
            checker.concept_embeds_weights[0] = 0.998  # what is above it by less than 0.0005 does not count
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)
