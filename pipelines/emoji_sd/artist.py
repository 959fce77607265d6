"""Draw names with a pipeline, find the guidance scale that draws them best, and measure the result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from .data import Pictures
from .evaluate import Figures, best_guidance, draw, grid, name_figures
from .precision import autocast


@dataclass(frozen=True)
class Artist:
    pipe: StableDiffusionPipeline | StableDiffusion3Pipeline
    pictures: Pictures  # all, with their names
    steps: int
    seed: int
    dtype: torch.dtype

    def draw(self, indices: list[int], guidance: float) -> Tensor:
        """The names of `pictures[indices]` → uint8 [N, 3, S, S]"""
        with autocast(str(self.pipe.device), self.dtype):
            return draw(self.pipe, [self.pictures.names[i] for i in indices], self.steps, guidance, self.seed)

    def sweep(self, indices: list[int], scales: list[float]) -> list[Figures]:
        """One row of figures per guidance scale."""
        return [
            {"guidance": scale, **name_figures(self.draw(indices, scale), self.pictures, indices)} for scale in scales
        ]

    def show(self, indices: list[int], drawn: Tensor, path: Path) -> None:
        some = self.pictures.select(indices)
        grid(some.images, drawn, some.names, path)


def spread(indices: list[int], count: int | None) -> list[int]:
    """At most `count` of them, evenly spread; None: all."""
    return indices if count is None else indices[:: -(-len(indices) // count)]


def draw_names(
    artist: Artist, trained: list[int], held_out: list[int], scales: list[float], tried: int, samples: Path | None
) -> Figures:
    """Figures of all trained names at the best guidance scale; with `samples`, grids of them and of other names."""
    rows = artist.sweep(spread(trained, tried), scales) if len(scales) > 1 else []
    guidance = best_guidance(rows) if rows else scales[0]
    start = time.monotonic()
    drawn = artist.draw(trained, guidance)
    seconds = (time.monotonic() - start) / len(trained)
    if samples is not None:
        few = spread(list(range(len(trained))), 34)
        artist.show([trained[i] for i in few], drawn[few], samples / "grid.png")
        others = spread(held_out, 16)
        artist.show(others, artist.draw(others, guidance), samples / "heldout.png")
    return {
        "size": drawn.shape[-1],
        "guidance": guidance,
        **({"guidance_sweep": rows} if rows else {}),
        "sampler": type(artist.pipe.scheduler).__name__,
        "seconds_per_picture": round(seconds, 2),
        **name_figures(drawn, artist.pictures, trained),
    }
