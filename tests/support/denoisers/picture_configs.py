"""Configurations of tiny transformers of pictures."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

LUMINA2: Config = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4), "cap_feat_dim": 32,
    "axes_lens": (32, 32, 32),
}  # fmt: skip
Z_IMAGE: Config = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1,
    "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 4, 4], "axes_lens": [256, 32, 32],
}  # fmt: skip
Z_CONTROL: Config = {
    "control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 24,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
}  # fmt: skip
COGVIEW: Config = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
}  # fmt: skip
HIDREAM: Config = {
    "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "caption_channels": [16, 12], "text_emb_dim": 16, "num_routed_experts": 2,
    "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (16, 16), "llama_layers": [0, 2],
}  # fmt: skip
HUNYUAN: Config = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": 16,
    "text_embed_2_dim": 12, "rope_axes_dim": (4, 4),
}  # fmt: skip
LUMINA_NEXT: Config = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2,
    "num_kv_heads": 1, "multiple_of": 8, "cross_attention_dim": 16,
}  # fmt: skip
KREA2: Config = {
    "in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 2,
    "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
IDEOGRAM4: Config = {
    "in_channels": 4, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "intermediate_size": 16,
    "adaln_dim": 8, "llm_features_dim": 16, "mrope_section": (2, 2, 2),
}  # fmt: skip
ERNIE: Config = {
    "hidden_size": 24, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 16, "in_channels": 4,
    "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 4, 4),
}  # fmt: skip
OMNIGEN: Config = {
    "in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
    "num_layers": 2, "pad_token_id": 0, "vocab_size": 20, "max_position_embeddings": 128,
    "original_max_position_embeddings": 64, "pos_embed_max_size": 16, "time_step_dim": 8,
    "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
}  # fmt: skip
JOY: Config = {
    "in_channels": 4, "hidden_size": 24, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}  # fmt: skip
NUCLEUS: Config = {
    "in_channels": 4, "out_channels": 1, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4), "mlp_ratio": 8.0,
    "moe_enabled": False,
}  # fmt: skip
UVIT: Config = {
    "hidden_size": 16, "cond_embed_dim": 16, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
    "encoder_hidden_size": 16, "vocab_size": 24, "codebook_size": 20, "in_channels": 8, "block_out_channels": 16,
    "num_res_blocks": 1, "downsample": True, "upsample": True, "block_num_heads": 2, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
PLAIN: Config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
UNIDIFFUSER: Config = {
    "text_dim": 16, "clip_img_dim": 16, "num_text_tokens": 6, "num_attention_heads": 2, "attention_head_dim": 8,
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 16, "patch_size": 2,
    "use_data_type_embedding": True, "norm_num_groups": 2,
}  # fmt: skip
DREAM_LITE: Config = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16,), "norm_num_groups": 4,
    "down_block_types": ("DreamLiteCrossAttnDownBlock2D",), "up_block_types": ("DreamLiteCrossAttnUpBlock2D",),
    "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2, "addition_embed_type": "time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24, "num_kv_heads": 1,
    "use_linear_projection": True,
}  # fmt: skip
