"""One call of a pipeline: every picture has its own seed, and is checked for NaN and infinite values.

Shapes: B pictures of a call, c channels, H, W pixels.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffattn.drawing.classes import draws_classes
from diffattn.machine import dtype_name

BLANKED = ("nsfw_content_detected", "nsfw_detected")
"""The fields of diffusers' outputs that mark pictures blanked by a safety checker."""


class NotFinite(ValueError):
    """A picture that could not be drawn: the model gave NaN or infinite values."""

    def __init__(self, pipe: Any, seed: int) -> None:
        precision = dtype_name(pipe.dtype)
        way_out = "try float32 or bfloat16" if precision == "float16" else "check its weights"
        super().__init__(
            f"the model gave NaN or infinite values instead of a picture (seed {seed}, {type(pipe).__name__} in "
            f"{precision}): {way_out}"
        )


@dataclass(frozen=True)
class Batch:
    """The pictures of one call."""

    images: Tensor  # [B, c, H, W] float32 in 0..1, on the CPU; NaN throughout where a picture is not finite
    seeds: tuple[int, ...]
    blanked: tuple[bool, ...]  # made black by the pipeline's safety checker
    finite: tuple[bool, ...]  # neither the latents nor the decoded picture had NaN or infinite values


def draw_batch(pipe: Any, subjects: Sequence[Any], seeds: Sequence[int], arguments: Mapping[str, Any]) -> Batch:
    """Draw one picture per subject, each with its own generator: picture i is the same alone and in a batch.

    The latents are checked once, before they are decoded, and the pictures once more, since a VAE can overflow on
    its own. Nothing is read from the device between the steps.

    Args:
        pipe: on its device.
        subjects: B prompts, or class ids for a pipeline that draws classes.
        seeds: B seeds.
        arguments: further arguments of the pipeline's call.

    Raises:
        NotFinite: none of the latents is finite, so there is nothing to decode.
        ValueError: decoded values outside 0..1; errors of the pipeline itself.
    """
    given = dict(arguments)
    if isinstance(given.get("negative_prompt"), str):  # diffusers requires both prompts to have the same type
        given["negative_prompt"] = [given["negative_prompt"]] * len(subjects)
    given["class_labels" if draws_classes(pipe) else "prompt"] = list(subjects)
    screen = _Screen(pipe, seeds)
    with screen.watching(given):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = pipe(**given, generator=generators, output_type="pt")
    images = _tensor(output.images)
    finite = screen.finite() & _finite_rows(images)
    images[~finite] = torch.nan
    if finite.any() and not 0 <= images[finite].min() <= images[finite].max() <= 1:
        raise ValueError(f"{type(pipe).__name__} gave pictures with values outside 0..1")
    return Batch(images, tuple(seeds), _blanked(output, len(seeds)), tuple(finite.tolist()))


def to_pictures(images: Tensor) -> list[Image.Image]:
    """[B, c, H, W] in 0..1, of 1 or 3 channels → B pictures of 8 bits, rounded as diffusers does."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x) for x in pixels]


class _Screen:
    """Which rows of the latents and of the decoded pictures are finite; read from the device only at the end."""

    def __init__(self, pipe: Any, seeds: Sequence[int]) -> None:
        self.pipe, self.seeds = pipe, seeds
        self._latents: list[Tensor] = []  # bool [rows] of every call of the decoder, on its device
        self._pixels: list[Tensor] = []
        self._last: Tensor | None = None  # latents after the latest step, of a pipeline without a VAE

    @contextmanager
    def watching(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Within the block, watch the decoder, or without one the latents, by adding to the pipeline's arguments."""
        decoder = getattr(getattr(self.pipe, "vae", None), "decoder", None)
        if not isinstance(decoder, nn.Module):
            self._watch_steps(arguments)
            yield
            return
        handles = [
            decoder.register_forward_pre_hook(self._before_decoding),
            decoder.register_forward_hook(self._after_decoding),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finite(self) -> Tensor:
        """bool [B] on the CPU; synchronises the device."""
        found = self._per_picture(self._latents) & self._per_picture(self._pixels)
        return found if self._last is None else found & _finite_rows(self._last).cpu()

    def _before_decoding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        rows = _finite_rows(args[0])
        if not self._latents and len(rows) == len(self.seeds) and not rows.any():
            raise NotFinite(self.pipe, self.seeds[0])
        self._latents.append(rows)

    def _after_decoding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._pixels.append(_finite_rows(output))

    def _per_picture(self, calls: list[Tensor]) -> Tensor:
        """A VAE decodes all pictures at once, in tiles, or (sliced) one picture at a time, each in tiles."""
        count = len(self.seeds)
        if not calls:
            return torch.ones(count, dtype=torch.bool)
        if all(len(rows) == count for rows in calls):
            return torch.stack(calls).all(dim=0).cpu()
        together = torch.cat(calls).cpu()
        return together.view(count, -1).all(dim=1) if len(together) % count == 0 else together.all().expand(count)

    def _watch_steps(self, arguments: dict[str, Any]) -> None:
        name = "callback_on_step_end"
        if name not in inspect.signature(self.pipe.__call__).parameters:
            return
        given = arguments.get(name)

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            found = {} if given is None else given(pipe, step, timestep, tensors)
            self._last = (found or {}).get("latents", tensors.get("latents"))
            return found

        arguments[name] = keep


def _finite_rows(x: Tensor) -> Tensor:
    """bool [B]"""
    return torch.isfinite(x).flatten(1).all(dim=1)


def _tensor(images: Any) -> Tensor:
    """[B, c, H, W] float32 on the CPU; a `DiTPipeline` always returns arrays [B, H, W, c]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.as_tensor(images).to("cpu", torch.float32, copy=True)


def _blanked(output: Any, count: int) -> tuple[bool, ...]:
    found = next((flags for name in BLANKED if (flags := getattr(output, name, None)) is not None), None)
    return (False,) * count if found is None else tuple(map(bool, found))
