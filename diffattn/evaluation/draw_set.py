"""Pictures drawn for an evaluation: picture i has prompt or class i modulo their number, and the seed SEED + i."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffattn.drawing.batch import Batch, NotFinite, draw_batch, to_pictures
from diffattn.drawing.classes import check_null_class, class_ids, class_names, draws_classes, num_classes
from diffattn.drawing.draw import guidance_for
from diffattn.drawing.sizes import drawn_size, size_arguments
from diffattn.evaluation.picture_set import ProgressBar, no_progress
from diffattn.evaluation.run_folder import RunFolder
from diffattn.files import write_whole, writing
from diffattn.metrics.paired import LatentTrace
from diffattn.patching.patch import Patch, find_patch, patch

PICTURES = "pictures"
UNACCELERATED = "unaccelerated"
LATENTS = "latents"
"""Folders of a run."""

CHECKS = {PICTURES: "checks", UNACCELERATED: "unaccelerated checks"}
"""Folders with "blanked" and "finite" [b] of every chunk of pictures, see `Batch`; a picture that is not finite has no
file."""


@dataclass(frozen=True)
class DrawConfig:
    """How pictures are drawn. Fields that are None are not passed on to the pipeline.

    Raises:
        ValueError: fewer than 2 pictures, or another value out of range.
    """

    num_pictures: int = 1000
    prompts: Sequence[str] | None = None  # for a DiT or SiT classes, by name or number; None there: all in turn
    steps: int = 25
    guidance: float | None = None  # None: the pipeline's own
    width: int | None = None  # pixels; None: the model's own
    height: int | None = None
    seed: int = 0
    batch: int = 1  # pictures of one call of the pipeline
    call: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline: negative_prompt, …

    def __post_init__(self) -> None:
        if self.num_pictures < 2:
            raise ValueError(f"the number of pictures must be 2 or more, got {self.num_pictures}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63 - self.num_pictures:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("there are no prompts")


def with_own_values(pipe: Any, config: DrawConfig) -> DrawConfig:
    """The same with the guidance that the pipeline draws with, see `guidance_for`, and with both sides if one is given.

    Raises:
        ValueError: a size that the pipeline cannot draw.
    """
    width, height = config.width, config.height
    if width is not None or height is not None:  # given one side, pipelines of diffusers ignore it
        width, height = drawn_size(pipe, width, height)
    return replace(config, guidance=guidance_for(pipe, config.guidance), width=width, height=height)


def subjects(pipe: Any, config: DrawConfig) -> list[Any]:
    """The prompts or class ids that are drawn in turn.

    Raises:
        ValueError: a pipeline that needs prompts and has none; an unknown class; guidance that it cannot give.
    """
    if not draws_classes(pipe):
        if config.prompts is None:
            raise ValueError(f"{type(pipe).__name__} draws from text and needs prompts (--prompts FILE)")
        return list(config.prompts)
    check_null_class(pipe, guidance_for(pipe, config.guidance) or 1.0)
    return list(range(num_classes(pipe))) if config.prompts is None else class_ids(pipe, config.prompts)


def drawn_titles(pipe: Any, config: DrawConfig, rows: Sequence[int]) -> list[str]:
    """Titles of the pictures with these numbers: prompt or class, and seed."""
    todo = subjects(pipe, config)
    names = (class_names(pipe).id2label or {}) if draws_classes(pipe) else {}
    words = [names.get(what, f"class {what}") if draws_classes(pipe) else what for what in todo]
    return [f"{words[row % len(words)]}, seed {config.seed + row}" for row in rows]


def picture_name(number: int) -> str:
    """The file of picture `number`, counted from 0."""
    return f"{number:07d}.png"


def accelerated(pipe: Any, acceleration: Mapping[str, Any] | None) -> AbstractContextManager[Any]:
    """Patch the pipeline within the block, with these arguments of `diffattn.patch`; None leaves it unchanged."""
    return nullcontext() if acceleration is None else patch(pipe, **acceleration)


def patch_of(pipe: Any) -> Patch | None:
    """A pipeline's patch; None without one, without a pipeline, and for architectures that cannot be patched."""
    try:
        return None if pipe is None else find_patch(pipe)
    except TypeError:
        return None


@contextmanager
def following(pipe: Any, run: RunFolder) -> Iterator[None]:
    """Within the block, a patched pipeline follows the run's earlier decisions on what is faster, and adds new ones."""
    found = patch_of(pipe)
    if found is not None:
        found.follow(run.decisions())
    yield
    if found is not None:
        run.add_decisions(found.decisions())


def draw_set(
    pipe: Any,
    config: DrawConfig,
    run: RunFolder,
    acceleration: Mapping[str, Any] | None = None,
    *,
    paired: bool = False,
    size: tuple[int, int] | None = None,
    progress: ProgressBar = no_progress,
) -> None:
    """Draw this process's share of the missing pictures as PNG files in the run's folder, and wait for all processes.

    Pictures that a safety checker blanked, and those that are NaN or infinite, are recorded in `CHECKS`.

    Args:
        pipe: on its device.
        config: what to draw.
        run: gets the pictures in `PICTURES`.
        acceleration: arguments of `diffattn.patch`; None: the pipeline as it is.
        paired: draw without the acceleration too, into `UNACCELERATED`, and write chunks `LATENTS`: "error" [b, steps],
            the relative error of the latents after every step (`latent_relative_error`), where the pipeline calls back.
        size: (H, W) that the pictures must have.
        progress: see `ProgressBar`.

    Raises:
        ValueError: pictures of another size; see `subjects`.
    """
    todo = subjects(pipe, config)
    for kind in (PICTURES, UNACCELERATED):
        with writing(run.path / kind):
            (run.path / kind).mkdir(parents=True, exist_ok=True)
    shares = list(run.mine(config.num_pictures, config.batch))
    outer, inner = (None, acceleration) if paired else (acceleration, None)
    with accelerated(pipe, outer), progress("drawing", len(shares)) as advance:
        for number, start, stop in shares:
            what = [todo[i % len(todo)] for i in range(start, stop)]
            chunk = _Chunk(pipe, config, run, what, start, size)
            traces = []
            if paired and not chunk.is_drawn(number, UNACCELERATED, LATENTS):
                traces.append(chunk.draw(number, UNACCELERATED))
            if traces or not chunk.is_drawn(number, PICTURES):
                with accelerated(pipe, inner), following(pipe, run):
                    traces.append(chunk.draw(number, PICTURES))
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
        files = [self.run.chunk(folder, number) for folder in (CHECKS[kind], tensors) if folder is not None]
        if not all(file.exists() for file in files):
            return False
        finite = load_file(files[0])["finite"].tolist()
        return all(path.exists() for path, there in zip(self.paths(kind), finite, strict=True) if there)

    def paths(self, kind: str) -> list[Path]:
        return [self.run.path / kind / picture_name(self.start + i) for i in range(len(self.what))]

    def draw(self, number: int, kind: str) -> LatentTrace:
        """Draw and save; the latents after every step."""
        trace, seeds = LatentTrace(), [self.config.seed + self.start + i for i in range(len(self.what))]
        batch = _draw(self.pipe, self.config, list(self.what), seeds, trace)
        if self.size not in (None, (found := (batch.images.shape[2], batch.images.shape[3]))) and any(batch.finite):
            raise ValueError(f"the pipeline draws {_pixels(found)} pixels, but the pictures to compare with have "
                             f"{_pixels(self.size)}; bring both to one size (--size)")  # fmt: skip
        for i, path in enumerate(self.paths(kind)):
            if batch.finite[i]:
                (picture,) = to_pictures(batch.images[i : i + 1])
                write_whole(path, partial(picture.convert("RGB").save, format="PNG"))
        checks = {"blanked": torch.tensor(batch.blanked), "finite": torch.tensor(batch.finite)}
        self.run.write(CHECKS[kind], number, checks)
        return trace


def _draw(pipe: Any, config: DrawConfig, what: list[Any], seeds: list[int], trace: LatentTrace) -> Batch:
    given: dict[str, Any] = {"num_inference_steps": config.steps, **size_arguments(pipe, config.width, config.height)}
    if (guidance := guidance_for(pipe, config.guidance)) is not None:
        given["guidance_scale"] = guidance
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        given["callback_on_step_end"] = trace
    try:
        return draw_batch(pipe, what, seeds, given | dict(config.call))
    except NotFinite:  # all of them
        none = (False,) * len(seeds)
        return Batch(torch.full((len(seeds), 3, 1, 1), torch.nan), tuple(seeds), none, none)


def _errors(exact: LatentTrace, trace: LatentTrace) -> dict[str, Tensor]:
    if not trace.steps:
        return {"error": torch.empty(0)}
    return {"error": torch.tensor(trace.errors(exact))}


def _pixels(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[1]}x{size[0]}"
