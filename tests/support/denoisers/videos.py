"""Tiny transformers of videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    MiniMaxH3Scheduler,
)

from support.denoisers.case import Case, area
from support.denoisers.video_inputs import (
    TEXT,
    animate,
    anyflow,
    cogvideox,
    consisid,
    cosmos,
    cosmos3,
    cosmos_control,
    framepack,
    helios,
    hunyuan,
    hunyuan_15,
    kandinsky5,
    kandinsky6,
    latents,
    ltx,
    ltx2,
    ltx_with_coordinates,
    minimax,
    mochi,
    motif,
    sana_wm,
    vace,
    wan_with_image,
)

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

LARGE_COGVIDEOX = {"max_text_seq_length": 16 * TEXT}

HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4),
}  # fmt: skip


COSMOS: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4,
    "max_size": (4, 64, 64), "patch_size": (1, 2, 2), "extra_pos_embed_type": None,
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
        num_layers=2, context=TEXT, scheduler=CogVideoXDDIMScheduler, enlarged=LARGE_COGVIDEOX,
    ),
    Case(
        "ConsisIDTransformer3DModel",
        COGVIDEOX | {
            "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 4, "cross_attn_num_heads": 1,
            "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 1, "LFE_dim_head": 8, "LFE_num_heads": 2,
            "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1,
        },
        consisid, batched_lists=frozenset({"id_vit_hidden"}),
        grid=(3, 4, 6), time=thousand, time_dtype=torch.int64, num_layers=2, context=TEXT,
        scheduler=CogVideoXDDIMScheduler, enlarged=LARGE_COGVIDEOX,
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
        framepack, references=((1, 1, 2), (2, 2, 3), (1, 4, 6)),
        grid=(3, 4, 6), time=thousand, num_layers=2, context=TEXT + 3,
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
    Case(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16,
            "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
            "in_audio_dim": 4, "out_audio_dim": 4,
        },
        kandinsky6, grid=(3, 4, 6), time=thousand, num_layers=2,
    ),
    Case(
        "AnyFlowTransformer3DModel",
        {name: value for name, value in WAN.items() if name != "qk_norm"},
        anyflow, grid=(3, 4, 6), time=thousand, time_shape=(3,), num_layers=2, scheduler=FlowMapEulerDiscreteScheduler,
    ),
    Case(
        "HeliosTransformer3DModel",
        {name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        helios, references=((1, 1, 2), (2, 2, 3), (1, 4, 6)), grid=(3, 4, 6), time=thousand, num_layers=2,
    ),
    Case(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
            "num_single_layers": 2, "num_decoder_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16,
            "image_embed_dim": 4, "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": True,
        },
        motif, grid=(3, 4, 6), time=thousand, num_layers=3, context=TEXT + 3,
    ),
    Case(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16,
        },
        ltx, grid=(3, 4, 6), time=thousand, num_layers=2,
    ),
    Case(
        "LTXVideoTransformer3DModel conditions",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16,
        },
        ltx_with_coordinates, grid=(3, 4, 6), time=thousand, time_shape=(72,), num_layers=2,
    ),
    Case(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16, "audio_in_channels": 4,
            "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8, "rope_double_precision": False,
        },
        ltx2, grid=(3, 4, 6), time=thousand, num_layers=2,
    ),
    Case(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "cross_attention_dim": 48, "sample_width": 12, "sample_height": 8, "sample_frames": 3,
            "caption_channels": 16,
        },
        latents(4), grid=(3, 4, 6), time=thousand, time_dtype=torch.int64, num_layers=2,
        scheduler=lambda: DDIMScheduler(beta_start=1e-4, beta_end=0.02),
    ),
    Case(
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4,
            "mmdit_layers": 1, "num_layers": 2, "patch_size": 2, "text_embed_dim": 16, "time_embed_dim": 8,
        },
        latents(4), grid=(3, 4, 6), time=thousand, num_layers=2, context=TEXT,
    ),
    Case(
        "LatteTransformer3DModel",
        {
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "caption_channels": 16, "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8,
            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
            "video_length": 3,
        },
        latents(4, 3, 8, 12), grid=(4, 6), time=thousand, time_dtype=torch.int64, num_layers=2,
        scheduler=lambda: DDIMScheduler(beta_start=1e-4, beta_end=0.02),
    ),
    Case(
        "CosmosTransformer3DModel 1",
        COSMOS
        | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "extra_pos_embed_type": "learnable",
            "concat_padding_mask": False,
        },
        cosmos, grid=(3, 4, 6), time=lambda t: 1000 * t, num_layers=2,
        scheduler=lambda: EDMEulerScheduler(sigma_max=80.0, sigma_data=1.0), level=0.0005,
    ),
    Case(
        "CosmosTransformer3DModel 2",
        COSMOS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "concat_padding_mask": False},
        cosmos, grid=(3, 4, 6), time=lambda u: u, time_shape=(1, 3, 1, 1), num_layers=2,
    ),
    Case(
        "CosmosControlNetModel",
        COSMOS | {"in_channels": 6, "latent_channels": 6, "model_channels": 24, "n_controlnet_blocks": 2},
        cosmos_control, grid=(3, 4, 6), time=lambda u: u, num_layers=2, output=lambda out: out[0][-1],
        needs="torchvision",
    ),
    Case(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
            "linear_head_dim": 16, "caption_channels": 16, "image_size": 64,
        },
        sana_wm, grid=(3, 4, 6), time=thousand, time_shape=(1, 3), num_layers=2,
    ),
    Case(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12, "hidden_size": 24, "intermediate_size": 32, "latent_channel": 4, "latent_patch_size": 2,
            "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 16,
            "rope_axes_dim": [2, 2, 2], "vocab_size": 32,
        },
        cosmos3, grid=(3, 4, 6), time=thousand, time_name="vision_timesteps", per_call=lambda t: [t] * area(72),
        num_layers=2, context=TEXT, batched=False, output=lambda out: out[0][0],
    ),
    Case(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "text_dim": 8,
            "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        minimax, grid=(3, 4, 6), time=lambda t: 1000 * t, num_layers=2, context=38, per_call=lambda t: [t, 0.97, 0.9],
        scheduler=MiniMaxH3Scheduler, level=0.0003,
    ),
)  # fmt: skip
