"""UNets of pictures and of videos, the ControlNets beside them, and ControlNet-XS within them.

Videos are pictures to their spatial layers: frames are folded into the batch. Their temporal layers run exact.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

from diffattn.architectures import plain_attention as attention
from diffattn.architectures.base import Replaced, Size
from diffattn.architectures.transformers import TEMPORAL
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import (
    QUARTER_LOG_SIGMA,
    Convention,
    Reading,
    TimeReader,
    discrete,
    dit_alphas_cumprod,
    level_of_sigma,
    values_of,
)

KINDS = (
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    ControlNetModel,
    ControlNetUnionModel,
    SparseControlNetModel,
    UNetControlNetXSModel,
)

TRAINING: Mapping[type, Convention] = {
    UNet2DModel: discrete(dit_alphas_cumprod()),
    UNetSpatioTemporalConditionModel: QUARTER_LOG_SIGMA,
}
"""The meaning of time steps where no scheduler is known, if it differs from Stable Diffusion's."""

OVER_FRAMES = re.compile(r"motion_modules|temporal_transformer_blocks|temp_attentions|transformer_in|temporal_encoder")
"""Names of layers over the frames of one position."""


class UNetArchitecture:
    """The UNets of diffusers whose levels halve the resolution."""

    title = (
        "UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL), UNet2DModel, UNetMotionModel (AnimateDiff), "
        "UNetSpatioTemporalConditionModel (Stable Video Diffusion), UNet3DConditionModel, I2VGenXLUNet, "
        "Kandinsky3UNet, ControlNetModel, ControlNetUnionModel, SparseControlNetModel and UNetControlNetXSModel"
    )
    sample_name = "sample"
    time_name = "timestep"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, KINDS)

    def layers(self, model: nn.Module) -> Iterator[tuple[LayerSpec, nn.Module]]:
        num_levels = len(_config(model).block_out_channels)
        for name, module in model.named_modules():
            if hasattr(module, "set_processor"):
                spec = attention.spec_of(name, module, _level(name, num_levels))
                if isinstance(model, Kandinsky3UNet):  # passes a layer's own tokens as if they were context
                    spec = replace(spec, is_cross_attention=not name.endswith("attentions.0.attention"))
                if _adds_keys(module):
                    spec = replace(spec, is_cross_attention=False, context="first", keys_only=True)
                if OVER_FRAMES.search(name):
                    spec = replace(spec, exact=TEMPORAL)
                yield spec, module

    def reason_exact(self, module: nn.Module) -> str | None:
        if _adds_keys(module):
            return attention.reason_unplugged(getattr(module, "processor", None))
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
        if isinstance(model, UNet2DModel) and _config(model).time_embedding_type == "fourier":  # its time is σ itself
            found = [level_of_sigma(sigma) for sigma in values_of(time)]
            return Reading(found, found, None)
        training = next((meaning for kind, meaning in TRAINING.items() if isinstance(model, kind)), None)
        return levels.read(time, training)

    def replaced(self, **parts: Any) -> Replaced:
        return attention.replaced(**parts)


def _adds_keys(module: nn.Module) -> bool:
    """Whether a layer attends to its own tokens and, before them, to keys of a text or a picture, as those of DeepFloyd
    IF and Kandinsky 2 do."""
    return getattr(module, "added_kv_proj_dim", None) is not None and not getattr(module, "only_cross_attention", True)


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
