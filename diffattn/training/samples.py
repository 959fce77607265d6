"""Pictures of a model under training: a grid of classes for every number of mediators."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffattn.files import write_whole
from diffattn.models import DiT
from diffattn.sampling import SiTPipeline


def pipeline_of(
    model: DiT, class_names: Sequence[str], vae: AutoencoderKL | None = None, guidance: float | None = None
) -> SiTPipeline:
    """A pipeline around a model, with the ODE's Euler sampler and a default guidance scale."""
    pipe = SiTPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1),
        vae=vae,
        id2label=dict(enumerate(class_names)),
        guidance_scale=guidance,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Grid:
    """A grid with a column per class and `rows` seeds per number of mediators; equal seeds are aligned vertically.

    Args:
        classes: class ids, one column each.
        rows: seeds.
        steps: of the sampler.
        guidance: scale; 1 turns it off.
        seed: of the first row; following rows have the next seeds.
    """

    classes: Sequence[int]
    rows: int
    steps: int
    guidance: float
    seed: int = 0

    def lines(self, model: DiT) -> list[tuple[int | None, int]]:
        """Number of mediators (None without any) and seed of every line of pictures."""
        return [(n, self.seed + row) for n in model.mediators or (None,) for row in range(self.rows)]

    def draw(self, pipe: SiTPipeline, number: int | None, seed: int) -> list[Image.Image]:
        """One line of pictures; restores the model's number of mediators."""
        model: DiT = pipe.transformer
        before = model.num_mediators
        call: Any = pipe
        try:
            if number is not None:
                model.set_num_mediators(number)
            return call(
                list(self.classes),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(seed) for _ in self.classes],
            ).images
        finally:
            model.num_mediators = before


def tile(lines: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Pictures of one size, in lines, on white."""
    width, height = lines[0][0].size
    across = max(len(line) for line in lines)
    sheet = Image.new("RGB", (across * (width + gap) - gap, len(lines) * (height + gap) - gap), "white")
    for y, line in enumerate(lines):
        for x, image in enumerate(line):
            sheet.paste(image, (x * (width + gap), y * (height + gap)))
    return sheet


def save_grid(image: Image.Image, folder: Path, step: int) -> Path:
    """Save as `step-00001000.png`; raises `OSError` if it cannot be written."""
    path = folder / f"step-{step:08d}.png"
    write_whole(path, lambda part: image.save(part, "PNG"))
    return path
