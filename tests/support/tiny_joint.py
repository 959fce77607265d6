"""Tiny real pipelines of joint transformers with random weights, for the tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from support import tiny, tiny_transformers
from support.denoisers.case import random_weights
from support.tiny import WIDTH


def sd3_transformer(**overrides: Any) -> SD3Transformer2DModel:
    """256 tokens of 16x16 latents in three blocks, before those of the text."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    return random_weights(SD3Transformer2DModel(**(config | overrides)).eval())


def flux_transformer(**overrides: Any) -> FluxTransformer2DModel:
    """144 tokens of 24x24 latents in two blocks of each kind, behind those of the text."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return random_weights(FluxTransformer2DModel(**(config | overrides)).eval())


def vae() -> AutoencoderKL:
    """With a shift of the latents, as the VAEs of these pipelines have."""
    torch.manual_seed(0)
    return AutoencoderKL.from_config(tiny.vae().config, shift_factor=0.1).eval()  # type: ignore[union-attr]


def sd3_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Two text encoders and no T5; `folder` is for the tokenizer's files."""
    tokenizer, encoder = tiny.tokenizer(folder), CLIPTextModelWithProjection(tiny.text_config()).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            sd3_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0), vae(),
            encoder, tokenizer, encoder, tokenizer, None, None,  # type: ignore[arg-type]
        )
    )  # fmt: skip


def flux_pipeline(folder: Path) -> FluxPipeline:
    """With both text encoders; `folder` is for a tokenizer's files."""
    words = T5Config(vocab_size=128, d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    return _quiet(
        FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), vae(), CLIPTextModel(tiny.text_config()).eval(), tiny.tokenizer(folder),
            T5EncoderModel(words).eval(), tiny_transformers.tokenizer(), flux_transformer(),
        )
    )  # fmt: skip


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
