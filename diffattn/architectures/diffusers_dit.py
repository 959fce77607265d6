"""The transformers of diffusers' own DiT and of PixArt: blocks of plain `Attention` over one grid of patches."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from diffattn.architectures import plain_attention as attention
from diffattn.architectures.base import Replaced, Size
from diffattn.architectures.dit_time import read_dit_time
from diffattn.methods.base import Grid, LayerSpec
from diffattn.noise_level import Reading, TimeReader


class Transformer2DArchitecture:
    """`DiTTransformer2DModel` and `PixArtTransformer2DModel`; PixArt's cross-attention to the text is not patched."""

    title = "DiTTransformer2DModel (DiT) and PixArtTransformer2DModel (PixArt-alpha, PixArt-Sigma)"
    sample_name = "hidden_states"
    time_name = "timestep"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, DiTTransformer2DModel | PixArtTransformer2DModel)

    def layers(self, model: nn.Module) -> Iterator[tuple[LayerSpec, nn.Module]]:
        for name, module in model.named_modules():
            if hasattr(module, "set_processor"):
                yield attention.spec_of(name, module, level=0), module

    def reason_exact(self, module: nn.Module) -> str | None:
        return attention.reason_exact(module)

    def entry(self, model: Any) -> nn.Module:
        return model.pos_embed

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        return given[self.sample_name]

    def timestep(self, given: Mapping[str, Any]) -> Any:
        return given.get(self.time_name)

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        height, width = self.sample(given).shape[-2:]
        return Size(height, width)

    def grids(self, model: nn.Module, height: int, width: int, frames: int | None = None) -> list[Grid]:
        config: Any = model.config
        return [(height // config.patch_size, width // config.patch_size)]  # rows that do not fill a patch are cut off

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        return read_dit_time(time, levels)

    def replaced(self, **parts: Any) -> Replaced:
        return attention.replaced(**parts)
