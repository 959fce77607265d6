"""Pictures drawn for an evaluation: number i has the prompt or class i modulo their number, and the seed SEED + i."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffattn.drawing.classes import check_null_class, class_ids, draws_classes, num_classes
from diffattn.drawing.sizes import size_arguments
from diffattn.evaluation.picture_set import Progress, no_progress
from diffattn.evaluation.run_folder import RunFolder
from diffattn.files import write_whole
from diffattn.metrics.features import as_uint8
from diffattn.metrics.paired import LatentTrace
from diffattn.patching.patch import patch

PICTURES = "pictures"
EXACT = "unaccelerated"
LATENTS = "latents"
"""Folders of a run."""


@dataclass(frozen=True)
class DrawConfig:
    """How pictures are drawn.

    Raises:
        ValueError: fewer than 2 pictures, or another value out of range.
    """

    num_pictures: int = 1000
    prompts: Sequence[str] | None = None  # for a DiT or SiT classes, by name or number; None there: all in turn
    steps: int = 25
    guidance: float = 7.5
    width: int | None = None  # pixels; None: the model's own
    height: int | None = None
    seed: int = 0
    batch: int = 1  # pictures of one call of the pipeline
    call: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline

    def __post_init__(self) -> None:
        if self.num_pictures < 2:
            raise ValueError(f"the number of pictures must be 2 or more, got {self.num_pictures}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63 - self.num_pictures:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("there are no prompts")


def subjects(pipe: Any, config: DrawConfig) -> list[Any]:
    """What is drawn in turn: prompts, or class ids.

    Raises:
        ValueError: a pipeline that needs prompts and has none; an unknown class; guidance that it cannot give.
    """
    if not draws_classes(pipe):
        if config.prompts is None:
            raise ValueError(f"{type(pipe).__name__} draws from text and needs prompts (--prompts FILE)")
        return list(config.prompts)
    check_null_class(pipe, config.guidance)
    return list(range(num_classes(pipe))) if config.prompts is None else class_ids(pipe, config.prompts)


def accelerated(pipe: Any, acceleration: Mapping[str, Any] | None) -> AbstractContextManager[Any]:
    """Within, the pipeline is patched with these arguments of `diffattn.patch`; None leaves it as it is."""
    return nullcontext() if acceleration is None else patch(pipe, **acceleration)


def draw_set(
    pipe: Any,
    config: DrawConfig,
    run: RunFolder,
    acceleration: Mapping[str, Any] | None = None,
    *,
    paired: bool = False,
    size: tuple[int, int] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Draw this process's share of what is missing as PNG files in the run's folder, and wait for all processes.

    Args:
        pipe: on its device.
        config: what to draw.
        run: gets the pictures in `PICTURES`.
        acceleration: arguments of `diffattn.patch`; None: the pipeline as it is.
        paired: draw without the acceleration too, into `EXACT`, and write chunks `LATENTS`: "error" [b, steps], the
            relative error of the latents after every step (see `latent_relative_error`), where the pipeline calls back.
        size: (H, W) that the pictures must have.
        progress: see `Progress`.

    Raises:
        ValueError: pictures with NaN or infinite values, their seeds named; pictures of another size; see `subjects`.
    """
    todo = subjects(pipe, config)
    for kind in (PICTURES, EXACT):
        (run.path / kind).mkdir(parents=True, exist_ok=True)
    shares = list(run.mine(config.num_pictures, config.batch))
    outer, inner = (None, acceleration) if paired else (acceleration, None)
    with accelerated(pipe, outer), progress("drawing", len(shares)) as advance:
        for number, start, stop in shares:
            what = [todo[i % len(todo)] for i in range(start, stop)]
            chunk = _Chunk(pipe, config, run, what, start, size)
            traces = []
            if paired and not chunk.is_drawn(number, EXACT, LATENTS):
                traces.append(chunk.draw(EXACT))
            if traces or not chunk.is_drawn(number, PICTURES):
                with accelerated(pipe, inner):
                    traces.append(chunk.draw(PICTURES))
            if len(traces) == 2:
                run.write(LATENTS, number, _errors(*traces))
            advance()
    run.among.wait()


@dataclass(frozen=True)
class _Chunk:
    """Pictures of one call of the pipeline."""

    pipe: Any
    config: DrawConfig
    run: RunFolder
    what: Sequence[Any]
    start: int
    size: tuple[int, int] | None

    def is_drawn(self, number: int, kind: str, tensors: str | None = None) -> bool:
        there = tensors is None or self.run.chunk(tensors, number).exists()
        return there and all(path.exists() for path in self.paths(kind))

    def paths(self, kind: str) -> list[Path]:
        return [self.run.path / kind / f"{self.start + i:07d}.png" for i in range(len(self.what))]

    def draw(self, kind: str) -> LatentTrace:
        """Draw and save; the latents after every step."""
        trace, seeds = LatentTrace(), [self.config.seed + self.start + i for i in range(len(self.what))]
        images = _draw(self.pipe, self.config, list(self.what), seeds, trace)
        if self.size not in (None, (found := (images.shape[2], images.shape[3]))):
            raise ValueError(f"the pipeline draws {_pixels(found)} pixels, and what its pictures are compared with has "
                             f"{_pixels(self.size)}; bring both to one size (--size)")  # fmt: skip
        for picture, path in zip(images.cpu(), self.paths(kind), strict=True):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            write_whole(path, partial(image.save, format="PNG"))
        return trace


def _draw(pipe: Any, config: DrawConfig, what: list[Any], seeds: list[int], trace: LatentTrace) -> Tensor:
    key = "class_labels" if draws_classes(pipe) else "prompt"
    given: dict[str, Any] = {**size_arguments(pipe, config.width, config.height)}
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        given["callback_on_step_end"] = trace
    output: Any = pipe(
        **{key: what},
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **given,
        **config.call,
    )
    try:
        return as_uint8(output.images.float())
    except ValueError as error:
        raise ValueError(f"seeds {seeds[0]} to {seeds[-1]}: {error}") from None


def _errors(exact: LatentTrace, trace: LatentTrace) -> dict[str, Tensor]:
    if not trace.steps:
        return {"error": torch.empty(0)}
    return {"error": torch.tensor(trace.errors(exact))}


def _pixels(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[1]}x{size[0]}"
