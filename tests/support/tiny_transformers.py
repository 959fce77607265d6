"""Tiny real DiT and PixArt pipelines of diffusers with random weights, for the tests."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 32  # of the text encoder, and of the transformers
LABELS = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "crane", 3: "crane", 999: "toilet tissue"}
"""A few of ImageNet's, as in the index of a saved model."""

SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "in_channels": 4,
    "out_channels": 8,  # with the learned variance, which the pipelines drop
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
}


def dit(**overrides: Any) -> DiTTransformer2DModel:
    """64 tokens of 16x16 latents in two layers; 1,000 classes, as its pipeline has written into it."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(**(SHAPE | overrides)).eval()


def pixart(**overrides: Any) -> PixArtTransformer2DModel:
    """64 tokens of 16x16 latents in two blocks, each with self-attention and cross-attention to the text."""
    torch.manual_seed(0)
    config: dict[str, Any] = SHAPE | {"cross_attention_dim": WIDTH, "caption_channels": WIDTH} | overrides
    return PixArtTransformer2DModel(**config).eval()


def dit_pipeline(vae: AutoencoderKL, **overrides: Any) -> DiTPipeline:
    scheduler: Any = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return DiTPipeline(dit(**overrides), vae, scheduler, id2label=LABELS)


def pixart_pipeline(vae: AutoencoderKL, sigma: bool = False, **overrides: Any) -> Any:
    torch.manual_seed(0)
    scheduler: Any = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    words = T5Config(vocab_size=128, d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(words).eval(),
        vae=vae,
        transformer=pixart(**overrides),
        scheduler=scheduler,
    )


def tokenizer() -> T5Tokenizer:
    """Letters only: every one of a prompt is a token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    letters = [(chr(code), -1.0) for code in range(97, 123)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0)
