"""Transformers of plain blocks over a picture: diffusers' general one, DreamLite's, and UVit over masked tokens."""

from collections.abc import Mapping
from typing import Any

from diffusers import DreamLiteTransformer2DModel, Transformer2DModel, UVit2DModel
from torch import nn

from diffattn.architectures.base import Size
from diffattn.architectures.diffusers_dit import Transformer2DArchitecture
from diffattn.architectures.dit_time import read_dit_time
from diffattn.methods.base import Grid
from diffattn.noise_level import Reading, TimeReader


class PlainTransformer(Transformer2DArchitecture):
    """`Transformer2DModel` over latents, patches of them or tokens of a codebook, and `DreamLiteTransformer2DModel`."""

    title = "Transformer2DModel, DreamLiteTransformer2DModel"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Transformer2DModel | DreamLiteTransformer2DModel)

    def entry(self, model: nn.Module) -> nn.Module:
        names = ("norm", "latent_image_embedding", "pos_embed")  # of latents, of tokens, of patches
        return next(module for name in names if (module := getattr(model, name, None)) is not None)

    def size(self, model: Any, given: Mapping[str, Any]) -> Size:
        sample = self.sample(given)
        if sample.ndim == 2:  # tokens [B, N]
            return Size(model.height, model.width)
        height, width = sample.shape[-2:]
        return Size(height, width)

    def grids(self, model: Any, height: int, width: int, frames: int | None = None) -> list[Grid]:
        patch = getattr(model.config, "patch_size", None) or 1
        return [(height // patch, width // patch)]

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        if time is None:
            return Reading([1.0], [1.0], None, known=False)
        return read_dit_time(time, levels)


class TokenTransformer(PlainTransformer):
    """`UVit2DModel` (aMUSEd), which has no time step: its input is tokens, and those still to be drawn are masked.

    Its noise level is the share of masked tokens, which every call determines anew.
    """

    title = "UVit2DModel"
    sample_name = "input_ids"
    time_name = "input_ids"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, UVit2DModel)

    def entry(self, model: Any) -> nn.Module:
        return model.embed

    def size(self, model: Any, given: Mapping[str, Any]) -> Size:
        height, width = self.sample(given).shape[-2:]
        return Size(height, width)

    def grids(self, model: Any, height: int, width: int, frames: int | None = None) -> list[Grid]:
        patch = 2 if model.config.downsample else 1
        return [(-(-height // patch), -(-width // patch))]

    def read_time(self, model: Any, time: Any, levels: TimeReader) -> Reading:
        """`time`: the tokens [B, h, w]."""
        masked = (time == model.config.vocab_size - 1).flatten(1).float().mean(dim=1).tolist()
        found = masked[:1] if len(set(masked)) == 1 else masked
        return Reading(found, found, None)
