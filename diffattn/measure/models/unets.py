"""UNets of real sizes. Configurations: unet/config.json of the models on huggingface.co that are named beside them."""

from diffattn.measure.models.base import PIXELS_PER_LATENT, BenchmarkModel

UNET = "UNet2DConditionModel"
SIZES = (512, 768, 1024, 1536)

# stable-diffusion-v1-5/stable-diffusion-v1-5
SD15 = BenchmarkModel(
    title="SD 1.5-size UNet",
    kind=UNET,
    sizes=SIZES,
    levels=(0, 1),
    unit=PIXELS_PER_LATENT,
    config={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,  # the number of heads, as in every Stable Diffusion config
        "cross_attention_dim": 768,
    },
)

# stabilityai/stable-diffusion-xl-base-1.0
SDXL = BenchmarkModel(
    title="SDXL-size UNet",
    kind=UNET,
    sizes=SIZES,
    levels=(1, 2),
    unit=PIXELS_PER_LATENT,
    config={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
