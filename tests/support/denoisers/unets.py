"""Tiny UNets of pictures and videos, with attention at one level only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DDPMWuerstchenScheduler, EulerDiscreteScheduler

from support.denoisers.case import Case, Inputs, normal, side

TEXT = 6
FRAMES = 3


def whole(u: float) -> float:
    """The scheduler's time step, a whole number."""
    return round(1000 * u)


def picture(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {"sample": normal(batch, 4, side(16), side(12), rng=rng)}


def video(height: int, width: int) -> Inputs:
    """Latents [B, 4, f, h, w] and a text."""

    def inputs(batch: int, rng: torch.Generator) -> dict[str, Any]:
        return {
            "sample": normal(batch, 4, FRAMES, side(height), side(width), rng=rng),
            "encoder_hidden_states": normal(batch, TEXT, 16, rng=rng),
        }

    return inputs


def stable_video(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "sample": normal(batch, FRAMES, 4, side(8), side(6), rng=rng),
        "encoder_hidden_states": normal(batch, 1, 16, rng=rng),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
    }


def i2vgen(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **video(8, 6)(batch, rng),
        "fps": torch.full((batch,), 16.0),
        "image_latents": normal(batch, 4, FRAMES, side(8), side(6), rng=rng),
        "image_embeddings": normal(batch, 16, rng=rng),
    }


def added_keys(batch: int, rng: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[-1, 4:] = 0
    return {
        "sample": normal(batch, 4, side(16), side(12), rng=rng),
        "encoder_hidden_states": normal(batch, TEXT, 12, rng=rng),
        "encoder_attention_mask": mask,
    }


def kandinsky3(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "sample": normal(batch, 4, side(16), side(12), rng=rng),
        "encoder_hidden_states": normal(batch, TEXT, 16, rng=rng),
        "encoder_attention_mask": torch.ones(batch, TEXT),
    }


def sparse_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **video(16, 12)(batch, rng),
        "controlnet_cond": normal(batch, 3, FRAMES, side(16), side(12), rng=rng),
        "conditioning_mask": torch.ones(batch, 1, FRAMES, side(16), side(12)),
    }


def cascade(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "sample": normal(batch, 4, side(16), side(12), rng=rng),
        "clip_text_pooled": normal(batch, 1, 16, rng=rng),
        "clip_text": normal(batch, TEXT, 16, rng=rng),
        "clip_img": normal(batch, 1, 16, rng=rng),
    }


TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "sample_size": 16, "cross_attention_dim": 16,
}  # fmt: skip

UNETS = (
    Case(
        "UNet2DConditionModel added keys",
        TWO_LEVELS | {
            "block_out_channels": (16, 16), "attention_head_dim": 8, "encoder_hid_dim": 12,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        added_keys, grid=(8, 6), time=whole, time_dtype=torch.int64, num_layers=4, context=TEXT,
        scheduler=DDPMScheduler,
    ),
    Case(
        "UNet2DModel",
        {
            "block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 4, "out_channels": 4,
            "layers_per_block": 1, "sample_size": 16, "attention_head_dim": 8, "add_attention": True,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        picture, grid=(8, 6), time=whole, time_dtype=torch.int64, num_layers=4, scheduler=DDPMScheduler,
    ),
    Case(
        "UNetMotionModel",
        TWO_LEVELS | {
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"), "num_attention_heads": 2,
        },
        video(16, 12), per_frame={"encoder_hidden_states": FRAMES}, grid=(8, 6), time=whole, time_dtype=torch.int64,
        num_layers=4,
        scheduler=lambda: DDIMScheduler(beta_schedule="linear"),
    ),
    Case(
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32,), "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "sample_size": 16, "cross_attention_dim": 16, "num_attention_heads": 2, "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",),
        },
        stable_video, grid=(8, 6), time=lambda t: 1000 * t, num_layers=4, level=0.0003,
        scheduler=lambda: EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_max=700.0,
            sigma_min=0.002,
        ),
    ),
    Case(
        "UNet3DConditionModel",
        TWO_LEVELS | {
            "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock3D",),
            "up_block_types": ("CrossAttnUpBlock3D",), "attention_head_dim": 8,
        },
        video(8, 6), grid=(8, 6), time=whole, time_dtype=torch.int64, num_layers=4, scheduler=DDIMScheduler,
    ),
    Case(
        "I2VGenXLUNet",
        TWO_LEVELS | {
            "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock3D",),
            "up_block_types": ("CrossAttnUpBlock3D",), "attention_head_dim": 4,
        },
        i2vgen, grid=(8, 6), time=whole, time_dtype=torch.int64, num_layers=4, scheduler=DDIMScheduler,
    ),
    Case(
        "Kandinsky3UNet",
        {
            "in_channels": 4, "time_embedding_dim": 16, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2,
            "block_out_channels": (16, 16), "cross_attention_dim": 16, "encoder_hid_dim": 16,
        },
        kandinsky3, grid=(8, 6), more_grids=((16, 12),), time=whole, time_dtype=torch.int64, num_layers=3,
        scheduler=DDPMScheduler,
    ),
    Case(
        "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
            "block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 16, "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 16, "clip_seq": 2, "self_attn": (False, True),
        },
        cascade, grid=(8, 6), time=lambda t: 1000 * t, time_name="timestep_ratio", num_layers=2, context=TEXT + 4,
        scheduler=DDPMWuerstchenScheduler, level=0.0007,
    ),
    Case(
        "SparseControlNetModel",
        {
            "block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 4, "layers_per_block": 1,
            "cross_attention_dim": 16, "num_attention_heads": 2, "conditioning_channels": 3,
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "concat_conditioning_mask": True, "use_simplified_condition_embedding": True,
        },
        sparse_control, per_frame={"encoder_hidden_states": FRAMES}, grid=(8, 6), time=whole, time_dtype=torch.int64,
        num_layers=2, scheduler=DDIMScheduler,
        output=lambda out: out[1],
    ),
)  # fmt: skip
