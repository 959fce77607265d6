"""A benchmark model: a denoiser of a published size with random weights, on which its speed does not depend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from diffattn.measure.denoiser_inputs import Inputs, make_denoiser_inputs
from diffattn.measure.memory import total_memory

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4  # of a video; its first latent frame is one frame
MEMORY_SHARE = 0.4  # of a device's memory that the weights may take: variants compiled beside each other need the rest


class Shape(NamedTuple):
    """The size of a picture or video, in pixels or latents."""

    height: int
    width: int
    frames: int | None = None  # None: a picture

    def __str__(self) -> str:
        return "x".join(str(n) for n in (self.width, self.height, self.frames) if n is not None)


@dataclass(frozen=True)
class BenchmarkModel:
    """One model. Sizes are the shorter side in pixels: "480p" of a video, the side of a square picture."""

    title: str
    kind: str  # the name of its class in diffusers
    config: Mapping[str, Any]  # as published; where it differs from the class's default, or every entry
    sizes: tuple[int, ...]  # that are measured by default
    levels: tuple[int, ...] = (0,)  # whose self-attention is compared by default
    unit: int = 16  # pixels along a token's side at the highest resolution of the latents
    aspect: float = 1.0  # width over height
    frames: int | None = None  # of a video
    depth: tuple[str, ...] = ()  # the entries of `config` that count layers
    fewer: Mapping[str, Any] = field(default_factory=dict)
    """Entries of `config` with fewer layers in about the same proportion: for a CPU, where a step takes minutes
    otherwise, and where the weights take too much memory."""

    @property
    def attention_levels(self) -> list[int]:
        """The levels that have self-attention; a UNet's deepest one has it in the middle block."""
        blocks = self.config.get("down_block_types")
        if blocks is None:
            return [0]
        return [i for i, block in enumerate(blocks) if "CrossAttn" in block or i == len(blocks) - 1]

    def shape(self, size: int) -> Shape:
        """The picture or video of a size, in pixels.

        Raises:
            ValueError: a size that is not a positive multiple of `unit` pixels.
        """
        if size < self.unit or size % self.unit:
            raise ValueError(f"sizes are multiples of {self.unit} pixels, got {size}")
        return Shape(size, round(size * self.aspect / self.unit) * self.unit, self.frames)

    def latents(self, size: int) -> Shape:
        """The latents of a size."""
        height, width, frames = self.shape(size)
        latent_frames = None if frames is None else (frames - 1) // FRAMES_PER_LATENT + 1
        return Shape(height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, latent_frames)

    def inputs(self, model: nn.Module, size: int, batch: int) -> Inputs:
        """Arguments of one call of the model; errors as `shape`."""
        height, width, frames = self.latents(size)
        return make_denoiser_inputs(model, height, width, batch, frames)

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Layers of the model with this configuration."""
        return sum(config[name] for name in self.depth)

    def shortened(self, device: torch.device | str, dtype: torch.dtype) -> bool:
        """Whether this device should be given fewer layers."""
        device = torch.device(device)
        if not self.fewer or device.type == "cpu":
            return bool(self.fewer)
        weights = sum(p.numel() for p in self.build("meta", dtype).parameters()) * dtype.itemsize
        return weights > MEMORY_SHARE * total_memory(device)

    def depth_text(self, shortened: bool) -> str | None:
        """ "4 of 24 layers", or "24 layers"; None for a UNet."""
        if not self.depth:
            return None
        every = self.num_layers(self.config)
        return f"{self.num_layers({**self.config, **self.fewer})} of {every} layers" if shortened else f"{every} layers"

    def build(self, device: torch.device | str, dtype: torch.dtype, shortened: bool = False) -> Any:
        """The denoiser in eval mode, with the same weights every time, made without a copy in another dtype.

        Args:
            device: where; on "meta" it has no weights.
            dtype: of weights and buffers.
            shortened: with fewer layers, see `fewer`.
        """
        config = {**self.config, **(self.fewer if shortened else {})}
        with torch.device(device), init_empty_weights(include_buffers=False):  # buffers are computed, as of rotations
            model: nn.Module = getattr(diffusers, self.kind)(**config)
        nn.Module.to(model, dtype)  # of weights that have no memory yet
        model.eval().requires_grad_(False)
        generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(0)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                module._parameters[name] = made if generator is None else _filled(made, name, generator)
        return model


def _filled(parameter: nn.Parameter, name: str, generator: torch.Generator) -> nn.Parameter:
    """Weights that keep activations near unit variance: no overflow, no denormal numbers."""
    if parameter.ndim > 1:
        return parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)  # type: ignore[return-value]
    return parameter.fill_(1.0 if name == "weight" else 0.0)  # type: ignore[return-value]  # of a norm, or a bias
