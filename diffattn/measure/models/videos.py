"""Transformers of videos. Configurations: transformer/config.json of the models on huggingface.co that are named
beside them."""

from diffattn.measure.models.base import BenchmarkModel

# Wan-AI/Wan2.1-T2V-1.3B-Diffusers
WAN = BenchmarkModel(
    title="Wan-1.3B-size transformer",
    kind="WanTransformer3DModel",
    sizes=(480,),
    aspect=832 / 480,
    frames=81,
    config={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 30,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
    depth=("num_layers",),
    fewer={"num_layers": 2},
)

# zai-org/CogVideoX-2b
COGVIDEOX = BenchmarkModel(
    title="CogVideoX-2b-size transformer",
    kind="CogVideoXTransformer3DModel",
    sizes=(480,),
    aspect=720 / 480,
    frames=49,
    config={
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": False,
    },
    depth=("num_layers",),
    fewer={"num_layers": 4},
)
