"""Shared by the tests of patching: options that always accelerate tiny models, and calls of them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from support import tiny

Make = Callable[[str], DiffusionPipeline]
FEW: Any = {"num_agents": 6, "agent_ratio": None, "max_head_error": float("inf"), "min_tokens": 0}
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


class ExactCalls(TorchFunctionMode):
    """Watches exact attention over the layers' own tokens: as many queries as keys.

    Attributes:
        tokens: of every call, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention and args[0].shape[-2] == args[1].shape[-2]:
            self.tokens.append(args[0].shape[-2])
        return function(*args, **(kwargs or {}))
