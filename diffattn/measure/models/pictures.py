"""Transformers of pictures. Configurations: transformer/config.json of the models on huggingface.co that are named
beside them."""

from diffattn.measure.models.base import BenchmarkModel

# stabilityai/stable-diffusion-3.5-medium
SD35_MEDIUM = BenchmarkModel(
    title="SD3.5-M-size transformer",
    kind="SD3Transformer2DModel",
    sizes=(1440,),
    config={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    depth=("num_layers",),
    fewer={"num_layers": 4, "dual_attention_layers": (0, 1)},
)

# PixArt-alpha/PixArt-Sigma-XL-2-2K-MS
PIXART_SIGMA = BenchmarkModel(
    title="PixArt-Σ-size transformer",
    kind="PixArtTransformer2DModel",
    sizes=(2048,),
    config={
        "sample_size": 256,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "num_attention_heads": 16,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": 4,
        "use_additional_conditions": False,
    },
    depth=("num_layers",),
    fewer={"num_layers": 7},
)

# black-forest-labs/FLUX.1-dev
FLUX = BenchmarkModel(
    title="FLUX.1-size transformer",
    kind="FluxTransformer2DModel",
    sizes=(2048,),
    config={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    depth=("num_layers", "num_single_layers"),
    fewer={"num_layers": 1, "num_single_layers": 2},
)

# Tongyi-MAI/Z-Image-Turbo
Z_IMAGE = BenchmarkModel(
    title="Z-Image-size transformer",
    kind="ZImageTransformer2DModel",
    sizes=(2048,),
    config={
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    depth=("n_layers", "n_refiner_layers"),
    fewer={"n_layers": 2, "n_refiner_layers": 1},
)
