"""UNets of real sizes with random weights: how fast they are does not depend on the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

PIXELS_PER_LATENT = 8
TEXT_TOKENS = 77
TIMESTEP = 900  # noise level 0.9 on Stable Diffusion's schedule: every preset accelerates there


@dataclass(frozen=True)
class BenchmarkModel:
    """One size of UNet. `levels` are those whose self-attention is compared by default."""

    title: str
    levels: tuple[int, ...]
    config: Mapping[str, Any]  # of UNet2DConditionModel, where it differs from the default

    @property
    def attention_levels(self) -> list[int]:
        """The levels that have self-attention; the deepest one has it in the middle block."""
        blocks = self.config["down_block_types"]
        return [i for i, block in enumerate(blocks) if "CrossAttn" in block or i == len(blocks) - 1]


SD15 = BenchmarkModel(
    title="SD 1.5-size UNet",
    levels=(0, 1),
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

SDXL = BenchmarkModel(
    title="SDXL-size UNet",
    levels=(1, 2),
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

TINY = BenchmarkModel(
    title="tiny UNet (for tests)",
    levels=(0, 1),
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

MODELS = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}


def build_unet(model: BenchmarkModel, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet in eval mode, made in place without a copy in another dtype, with the same weights every time."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**model.config)
    nn.Module.to(unet, dtype)
    unet.to_empty(device=device).eval().requires_grad_(False)
    assert not list(unet.buffers()), "a buffer would be left without its value"
    generator = torch.Generator(device).manual_seed(0)
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _fill(parameter, name, generator)
    return unet


def _fill(parameter: nn.Parameter, name: str, generator: torch.Generator) -> None:
    """Weights that keep activations near unit variance: no overflow, no denormal numbers."""
    if parameter.ndim > 1:
        parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    else:
        parameter.fill_(1.0 if name == "weight" else 0.0)  # of a norm, or a bias


def make_inputs(unet: UNet2DConditionModel, size: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one UNet call for square pictures of `size` pixels: (latents, time step), and the conditions.

    Raises:
        ValueError: a size that is not a positive multiple of 8 pixels.
    """
    if size < PIXELS_PER_LATENT or size % PIXELS_PER_LATENT:
        raise ValueError(f"sizes are multiples of {PIXELS_PER_LATENT} pixels, got {size}")
    config: Any = unet.config
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    side = size // PIXELS_PER_LATENT
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, config.cross_attention_dim),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.tensor([[size, size, 0, 0, size, size]] * batch)
        kwargs["added_cond_kwargs"] = {
            "text_embeds": noise(batch, pooled),
            "time_ids": time_ids.to(unet.device, unet.dtype),
        }
    return (noise(batch, config.in_channels, side, side), TIMESTEP), kwargs
