"""The picture sizes of a pipeline, in pixels."""

import math
from typing import Any

from diffusers import DiTPipeline

from diffattn.architectures.denoisers import Pipeline, denoiser_of
from diffattn.sampling import SiTPipeline

MIN_MULTIPLE = 8  # diffusers' Stable Diffusion pipelines refuse other sizes, whatever their VAE


def size_arguments(pipe: Any, width: int | None, height: int | None) -> dict[str, int]:
    """The size arguments of a pipeline's call; None for its own size, the only one of a `DiTPipeline`.

    Raises:
        ValueError: another size for a `DiTPipeline`.
    """
    if isinstance(pipe, DiTPipeline):
        drawn_size(pipe, width, height)
        return {}
    return {name: size for name, size in (("width", width), ("height", height)) if size is not None}


def drawn_size(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height of what is drawn: as given, and a side that is not given as in `default_size`.

    Raises:
        ValueError: see `check_size` and `default_size`.
    """
    if width is None or height is None:
        own_width, own_height = default_size(pipe)
        width = own_width if width is None else width
        height = own_height if height is None else height
    check_size(pipe, width, height)
    return width, height


def check_size(pipe: Pipeline, width: int, height: int) -> None:
    """Raise `ValueError` for a size that the pipeline cannot draw, naming the nearest valid ones."""
    if isinstance(pipe, DiTPipeline):
        own = default_size(pipe)
        if (width, height) != own:
            raise ValueError(f"{type(pipe).__name__} draws {own[0]}x{own[1]} pixels only, got {width}x{height}")
        return
    check_multiple(size_unit(pipe), width, height)


def size_unit(pipe: Any) -> int:
    """Pixels that the width and height of a pipeline's pictures must be multiples of."""
    if isinstance(pipe, SiTPipeline):
        return pipe.transformer.patch_size * pipe.vae_scale_factor
    return math.lcm(MIN_MULTIPLE, pixels_per_latent(pipe))


def check_multiple(unit: int, width: int, height: int) -> None:
    """Raise `ValueError` for a size that is no multiple of `size_unit`, naming the nearest valid ones."""
    for name, size in (("width", width), ("height", height)):
        if size < 1 or size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            near = f"{below} or {above}" if below > 0 else str(max(above, unit))
            raise ValueError(f"{name} {size} is not a positive multiple of {unit} pixels; nearest: {near}")


def pixels_per_latent(pipe: Any) -> int:
    """Pixels per latent along one side; `DiTPipeline` does not state it."""
    if isinstance(pipe, DiTPipeline):
        return 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return int(getattr(pipe, "vae_scale_factor", 1))


def default_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that the denoiser was trained for, which a pipeline draws if it is given no size.

    Raises:
        ValueError: neither the denoiser nor the pipeline names a size, or it is none.
    """
    size = getattr(getattr(denoiser_of(pipe), "config", None), "sample_size", None)
    size = getattr(pipe, "default_sample_size", None) if size is None else size
    if size is None:
        raise ValueError(f"{type(pipe).__name__} has no size of its own; give width and height")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"the sample_size of a denoiser is one number or two, got {str(size)[:40]!r}")
    rows, columns = sides
    return columns * pixels_per_latent(pipe), rows * pixels_per_latent(pipe)
