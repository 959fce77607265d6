"""Stable Cascade's prior and decoder, whose layers see the picture's tokens and, as keys only, those of its text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import cos, pi, sqrt
from typing import Any

from torch import nn

from diffattn.architectures.base import Size
from diffattn.architectures.transformers import TransformerFamily
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import Reading, TimeReader, rounding_of, values_of

OFFSET = 0.008  # of the cosine schedule


@dataclass(frozen=True)
class CascadeFamily(TransformerFamily):
    """A UNet whose blocks have attention; a level halves the resolution unless the configuration says otherwise."""

    def layers(self, model: Any) -> Iterator[tuple[LayerSpec, nn.Module]]:
        last = len(model.config.block_out_channels) - 1
        for spec, module in super().layers(model):
            side, number, _ = spec.name.split(".", 2)
            level = int(number) if side == "down_blocks" else last - int(number)
            block: Any = model.get_submodule(spec.name.rpartition(".")[0])
            yield replace(spec, level=level, is_cross_attention=not block.self_attn), module

    def grids(self, model: Any, height: int, width: int, frames: int | None = None) -> list[tuple[int, ...]]:
        config, patch = model.config, model.config.patch_size
        grids = [(height // patch, width // patch)]
        for halves in config.switch_level or [True] * (len(config.block_out_channels) - 1):
            rows, columns = grids[-1]
            grids.append((rows // 2, columns // 2) if halves else (rows, columns))
        return grids

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        found = [_noise_level(ratio) for ratio in values_of(time)]
        return Reading(found, found, levels.read(time, rounding=rounding_of(time, 1)).run)


def _noise_level(ratio: float) -> float:
    """σ/(1 + σ) of the cosine schedule, from 0 (data) to 1 (noise)."""
    begin = OFFSET / (1 + OFFSET) * pi / 2
    signal = cos(min(max((ratio + OFFSET) / (1 + OFFSET), 0.0), 1.0) * pi / 2) / cos(begin)  # √ᾱ
    signal = min(max(signal, 0.01), sqrt(0.9999))
    noise = sqrt(1 - signal**2)
    return noise / (signal + noise)


def _size(model: Any, given: Mapping[str, Any]) -> Size:
    height, width = given["sample"].shape[-2:]
    pooled, text, picture = (given.get(name) for name in ("clip_text_pooled", "clip_text", "clip_img"))
    assert pooled is not None
    tokens = pooled.shape[1] * model.config.clip_seq
    if text is not None and picture is not None:
        pictures = picture.shape[1] if picture.ndim == 3 else 1
        tokens += text.shape[1] + pictures * model.config.clip_seq
    return Size(height, width, num_context=tokens)


CASCADE_FAMILIES = (
    CascadeFamily(
        ("StableCascadeUNet",),
        size_of=_size,
        patch=lambda config: (config.patch_size, config.patch_size),
        entry_name="embedding",
        context="last",
        keys_only=True,
        rotated=False,
        sample_name="sample",
        time_name="timestep_ratio",
    ),
)
