"""A tiny model of every class, for tests and rehearsals: the same code, in a fraction of a second.

Sizes are large enough for landmarks to pay off, since texts are as long as those of large models.
"""

from diffattn.measure.models.base import PIXELS_PER_LATENT, BenchmarkModel
from diffattn.measure.models.unets import UNET

TINY = BenchmarkModel(
    title="tiny UNet (for tests)",
    kind=UNET,
    sizes=(64, 128),
    levels=(0, 1),
    unit=PIXELS_PER_LATENT,
    config={
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
)

TINY_SD3 = BenchmarkModel(
    title="tiny SD3 transformer (for tests)",
    kind="SD3Transformer2DModel",
    sizes=(384,),
    config={
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    },
    depth=("num_layers",),
    fewer={"num_layers": 2, "dual_attention_layers": (0,)},
)

TINY_PIXART = BenchmarkModel(
    title="tiny PixArt transformer (for tests)",
    kind="PixArtTransformer2DModel",
    sizes=(192,),
    config={
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "use_additional_conditions": False,
    },
    depth=("num_layers",),
)

TINY_FLUX = BenchmarkModel(
    title="tiny FLUX transformer (for tests)",
    kind="FluxTransformer2DModel",
    sizes=(512,),
    config={
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    },
    depth=("num_layers", "num_single_layers"),
    fewer={"num_layers": 1, "num_single_layers": 2},
)

TINY_Z_IMAGE = BenchmarkModel(
    title="tiny Z-Image transformer (for tests)",
    kind="ZImageTransformer2DModel",
    sizes=(288,),
    config={
        "in_channels": 4,
        "dim": 24,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 4, 4],
        "axes_lens": [256, 32, 32],
    },
    depth=("n_layers", "n_refiner_layers"),
)

TINY_WAN = BenchmarkModel(
    title="tiny Wan transformer (for tests)",
    kind="WanTransformer3DModel",
    sizes=(96,),
    aspect=4 / 3,
    frames=13,
    config={
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    depth=("num_layers",),
)

TINY_COGVIDEOX = BenchmarkModel(
    title="tiny CogVideoX transformer (for tests)",
    kind="CogVideoXTransformer3DModel",
    sizes=(192,),
    aspect=4 / 3,
    frames=9,
    config={
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 32,
        "sample_height": 24,
        "sample_frames": 9,
        "max_text_seq_length": 226,
    },
    depth=("num_layers",),
)
