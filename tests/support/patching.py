"""What the tests of patching share: options that always accelerate tiny models, and calls of them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

import diffattn
from support import tiny

Make = Callable[[str], DiffusionPipeline]
FEW: Any = {"num_agents": 6, "agent_ratio": None, "min_tokens": 0}
ALWAYS: Any = FEW | {"schedule": {0.0: {}}}
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def self_attention(model: nn.Module) -> dict[str, Any]:
    """The self-attention layers of a UNet by name."""
    return {name: m for name, m in model.named_modules() if name.endswith("attn1")}


@torch.no_grad()
def call(unet: UNet2DConditionModel, size: tuple[int, int] = (16, 16), timestep: Any = 901, **more: Any) -> Tensor:
    """One call of a tiny UNet with two samples, always the same."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 7, tiny.WIDTH, generator=generator)
    dtype = next(unet.parameters()).dtype
    return unet(x.to(dtype), timestep, encoder_hidden_states=context.to(dtype), **more).sample


def record(handle: diffattn.Patch) -> list[str]:
    """The layers whose original processors are called from now on, in order."""
    called: list[str] = []

    def recording(name: str, original: Any) -> Any:
        def processor(*args: Any, **kwargs: Any) -> Tensor:
            called.append(name)
            return original(*args, **kwargs)

        return processor

    for layer in handle._layers:
        if layer.processor is not None:
            layer.processor.original = recording(layer.spec.name, layer.processor.original)
    return called
