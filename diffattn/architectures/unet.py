"""Stable Diffusion's UNets (1.x, 2.x, XL, inpainting), the ControlNets beside them, and ControlNet-XS within them."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel, UNetControlNetXSModel
from torch import Tensor, nn

from diffattn.architectures import plain_attention as attention
from diffattn.architectures.base import Replaced, Size
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import Reading, TimeReader


class UNetArchitecture:
    """`UNet2DConditionModel`, `ControlNetModel`, `ControlNetUnionModel` and `UNetControlNetXSModel`."""

    title = (
        "UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL), ControlNetModel, ControlNetUnionModel and "
        "UNetControlNetXSModel"
    )
    sample_name = "sample"
    time_name = "timestep"

    def matches(self, model: nn.Module) -> bool:
        kinds = UNet2DConditionModel | ControlNetModel | ControlNetUnionModel | UNetControlNetXSModel
        return isinstance(model, kinds)

    def layers(self, model: nn.Module) -> Iterator[tuple[LayerSpec, nn.Module]]:
        num_levels = len(_config(model).block_out_channels)
        for name, module in model.named_modules():
            if hasattr(module, "set_processor"):
                yield attention.spec_of(name, module, _level(name, num_levels)), module

    def reason_exact(self, module: nn.Module) -> str | None:
        return attention.reason_exact(module)

    def entry(self, model: Any) -> nn.Module:
        return model.base_conv_in if isinstance(model, UNetControlNetXSModel) else model.conv_in

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        return given[self.sample_name]

    def timestep(self, given: Mapping[str, Any]) -> Any:
        return given[self.time_name]

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        height, width = self.sample(given).shape[-2:]
        return Size(height, width)

    def grids(self, model: nn.Module, height: int, width: int, frames: int | None = None) -> list[tuple[int, int]]:
        grids = []
        for _ in _config(model).block_out_channels:
            grids.append((height, width))
            height, width = (height + 1) // 2, (width + 1) // 2  # stride-2 convolutions round up
        return grids

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        return levels.read(time)

    def replaced(self, **parts: Any) -> Replaced:
        return attention.replaced(**parts)


def _config(model: nn.Module) -> Any:
    return model.config


def _level(name: str, num_levels: int) -> int:
    """Level of a block by its position: down_blocks count down, up_blocks count back up."""
    place, _, rest = name.partition(".")
    if place == "down_blocks":
        return int(rest.partition(".")[0])
    if place == "up_blocks":
        return num_levels - 1 - int(rest.partition(".")[0])
    return num_levels - 1
