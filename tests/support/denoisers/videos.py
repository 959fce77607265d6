"""Tiny transformers of videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from support.denoisers.case import Case, Inputs, normal

TEXT = 6


def latents(channels: int, frames: int = 3, height: int = 8, width: int = 12, text: int = 16) -> Inputs:
    """Latents [B, C, f, h, w] and a text [B, 6, text]."""

    def inputs(batch: int, rng: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(batch, channels, frames, height, width, rng=rng),
            "encoder_hidden_states": normal(batch, TEXT, text, rng=rng),
        }

    return inputs


def wan_with_image(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(8)(batch, rng),
        "encoder_hidden_states": normal(batch, 512, 16, rng=rng),
        "encoder_hidden_states_image": normal(batch, 5, 20, rng=rng),
    }


def vace(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**latents(4)(batch, rng), "control_hidden_states": normal(batch, 12, 3, 8, 12, rng=rng)}


def animate(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(12, frames=5)(batch, rng),
        "encoder_hidden_states_image": normal(batch, 5, 16, rng=rng),
        "pose_hidden_states": normal(batch, 4, 4, 8, 12, rng=rng),
        "face_pixel_values": normal(batch, 3, 13, 16, 16, rng=rng),
    }


def cogvideox(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = latents(4)(batch, rng)
    return given | {"hidden_states": given["hidden_states"].transpose(1, 2).contiguous()}


def consisid(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **cogvideox(batch, rng),
        "id_vit_hidden": [normal(batch, 2, 2, rng=rng)],
        "id_cond": normal(batch, 2, rng=rng),
    }


def padded(batch: int, tokens: int = TEXT) -> Tensor:
    """A mask [B, tokens] over text of different lengths."""
    lengths = tokens - 2 * torch.arange(batch)[:, None] % tokens
    return torch.arange(tokens)[None] < lengths


def hunyuan(channels: int, *size: int) -> Inputs:
    def inputs(batch: int, rng: torch.Generator) -> dict[str, Any]:
        return {
            **latents(channels, *size)(batch, rng),
            "encoder_attention_mask": padded(batch).float(),
            "pooled_projections": normal(batch, 8, rng=rng),
            "guidance": torch.full((batch,), 6000.0),
        }

    return inputs


def hunyuan_15(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(4, 3, 4, 6)(batch, rng),
        "encoder_attention_mask": padded(batch).float(),
        "encoder_hidden_states_2": normal(batch, 4, 16, rng=rng),
        "encoder_attention_mask_2": padded(batch, 4).float(),
        "image_embeds": torch.zeros(batch, 3, 16),
    }


def framepack(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **hunyuan(4)(batch, rng),
        "image_embeds": normal(batch, 3, 16, rng=rng),
        "indices_latents": torch.arange(8.0, 11),
        "latents_clean": normal(batch, 4, 1, 8, 12, rng=rng),
        "indices_latents_clean": torch.zeros(1),
        "latents_history_2x": normal(batch, 4, 3, 8, 12, rng=rng),
        "indices_latents_history_2x": torch.arange(5.0, 8),
        "latents_history_4x": normal(batch, 4, 4, 8, 12, rng=rng),
        "indices_latents_history_4x": torch.arange(1.0, 5),
    }


def mochi(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**latents(4)(batch, rng), "encoder_attention_mask": padded(batch)}


def kandinsky5(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = latents(4)(batch, rng)
    return {
        "hidden_states": given["hidden_states"].movedim(1, -1).contiguous(),
        "encoder_hidden_states": given["encoder_hidden_states"],
        "pooled_projections": normal(batch, 16, rng=rng),
        "visual_rope_pos": [torch.arange(n) for n in (3, 4, 6)],
        "text_rope_pos": torch.arange(TEXT),
    }


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip

COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": TEXT,
}  # fmt: skip

HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4),
}  # fmt: skip


def thousand(u: float) -> float:
    """The scheduler's time step itself."""
    return round(1000 * u, 3)


VIDEOS = (
    Case("WanTransformer3DModel", WAN, latents(4), grid=(3, 4, 6), time=thousand, num_layers=2),
    Case(
        "WanTransformer3DModel I2V", WAN | {"in_channels": 8, "image_dim": 20, "added_kv_proj_dim": 24},
        wan_with_image, grid=(3, 4, 6), time=thousand, num_layers=2,
    ),
    Case(
        "WanTransformer3DModel 2.2 TI2V", WAN, latents(4), grid=(3, 4, 6), time=thousand, time_shape=(72,),
        num_layers=2,
    ),
    Case(
        "WanVACETransformer3DModel", WAN | {"vace_layers": [0], "vace_in_channels": 12}, vace, grid=(3, 4, 6),
        time=thousand, num_layers=3,
    ),
    Case(
        "WanAnimateTransformer3DModel",
        WAN | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_size": 16, "motion_dim": 4,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 8,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        animate, grid=(5, 4, 6), time=thousand, num_layers=2,
    ),
    Case("SkyReelsV2Transformer3DModel", WAN, latents(4), grid=(3, 4, 6), time=thousand, num_layers=2),
    Case("ChronoEditTransformer3DModel", WAN, latents(4), grid=(3, 4, 6), time=thousand, num_layers=2),
    Case(
        "CogVideoXTransformer3DModel", COGVIDEOX, cogvideox, grid=(3, 4, 6), time=thousand, time_dtype=torch.int64,
        num_layers=2, context=TEXT, scheduler=CogVideoXDDIMScheduler,
    ),
    Case(
        "ConsisIDTransformer3DModel",
        COGVIDEOX | {
            "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 4, "cross_attn_num_heads": 1,
            "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 1, "LFE_dim_head": 8, "LFE_num_heads": 2,
            "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1,
        },
        consisid, grid=(3, 4, 6), time=thousand, time_dtype=torch.int64, num_layers=2, context=TEXT,
        scheduler=CogVideoXDDIMScheduler,
    ),
    Case(
        "HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan(4), grid=(3, 4, 6), time=thousand, num_layers=2,
        context=TEXT,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "text_embed_2_dim": 16,
            "image_embed_dim": 16, "rope_axes_dim": (4, 4, 4), "target_size": 16, "task_type": "t2v",
        },
        hunyuan_15, grid=(3, 4, 6), time=thousand, num_layers=2, context=TEXT + 4 + 3,
    ),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        framepack, grid=(3, 4, 6), time=thousand, num_layers=2, context=TEXT + 3,
    ),
    Case(
        "MochiTransformer3DModel",
        {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4,
            "max_sequence_length": TEXT,
        },
        mochi, grid=(3, 4, 6), time=thousand, num_layers=2, context=TEXT, calls_per_sample=True,
        scheduler=lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16,
            "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
        },
        kandinsky5, grid=(3, 4, 6), time=thousand, num_layers=2, output=lambda out: out,
    ),
)  # fmt: skip
