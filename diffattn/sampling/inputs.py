"""Checks of the arguments of a pipeline call. Each raises an error that names the value and what is allowed.

Shapes: B images, c channels, H height and W width of the latents (of the pixels without a VAE).
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from diffattn.sampling.euler_maruyama import EulerMaruyamaScheduler

Generators = torch.Generator | list[torch.Generator]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PICTURE_CHANNELS = (1, 3)
SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, EulerMaruyamaScheduler)
"""Schedulers whose model output is -v, and whose time step falls from num_train_timesteps (noise) to 0 (data)."""


def check_velocity_model(transformer: Any) -> None:
    """Raise `ValueError` if the model's output is not a velocity from noise to data."""
    config = transformer.config
    if config.get("prediction") != "velocity":
        raise ValueError(
            f"SiTPipeline samples models that predict the velocity; this {type(transformer).__name__} has "
            f'prediction={config.get("prediction")!r}. Models that predict noise ("epsilon") run in diffusers\' '
            "DiTPipeline, after `model.to_diffusers()`"
        )
    if config.time_direction != "noise_to_data":
        raise ValueError(f"SiTPipeline needs time_direction 'noise_to_data', got {config.time_direction!r}")


def check_scheduler(scheduler: Any, transformer: Any) -> None:
    """Raise `TypeError` if the scheduler does not sample velocity models, `ValueError` if it follows another path.

    Only samplers that add noise depend on the path; models saved without one were trained on the linear path.
    """
    if not isinstance(scheduler, SCHEDULERS):
        allowed = ", ".join(allowed.__name__ for allowed in SCHEDULERS)
        raise TypeError(f"a velocity model is sampled with one of {allowed}; got {type(scheduler).__name__}")
    trained = transformer.config.get("path", "linear")
    if scheduler.config.get("invert_sigmas"):
        raise ValueError("the scheduler's invert_sigmas must be False: this model's time falls from noise to data")
    if scheduler.config.get("stochastic_sampling") and trained != "linear":
        raise ValueError(
            f"stochastic_sampling follows the linear path, but the transformer was trained on {trained!r}: use "
            f"EulerMaruyamaScheduler(path={trained!r})"
        )
    if isinstance(scheduler, EulerMaruyamaScheduler) and scheduler.config["path"] != trained:
        raise ValueError(
            f"the scheduler's path is {scheduler.config['path']!r}, but the transformer was trained on {trained!r}: "
            f"use EulerMaruyamaScheduler(path={trained!r}), or correct `path` in the transformer's configuration"
        )


def check_at_least_1(name: str, number: Any) -> None:
    """Raise `TypeError` for what is no whole number, and `ValueError` for one below 1."""
    _check_whole(name, number)
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}")


def _check_whole(name: str, number: Any) -> None:
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise TypeError(f"{name} must be a whole number, got {number!r}")


def check_guidance(config: Any, scale: float, channels: int | None) -> None:
    """Raise `ValueError` for guidance that a transformer of this configuration does not support, `TypeError` for what
    is no number."""
    if not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {scale!r}")
    if channels is not None:
        _check_whole("guidance_channels", channels)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale must be 0 or more, got {scale}")
    if scale != 1 and not config.null_class:
        raise ValueError(
            f"guidance_scale={scale} needs a model with a null class, trained with label dropout; "
            "this one has none, and runs with guidance_scale=1 only"
        )
    if channels is not None and not 1 <= channels <= config.in_channels:
        raise ValueError(f"guidance_channels must be 1 to {config.in_channels}, or None for all, got {channels}")


def check_output_type(config: Any, output_type: str, has_vae: bool) -> None:
    """Raise `ValueError` for a kind of output that a transformer of this configuration does not have."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if output_type == "pil" and not has_vae and config.in_channels not in PICTURE_CHANNELS:
        raise ValueError(
            f"output_type 'pil' needs a VAE, or 1 or 3 channels; this model draws {config.in_channels}: "
            "use 'np', 'pt' or 'latent'"
        )


def check_tensor_inputs(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise `ValueError` for tensors that callbacks do not support."""
    if unknown := set(names) - set(allowed):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs may have {', '.join(allowed)}, got {', '.join(sorted(unknown))}"
        )


def check_generators(generator: Generators | None, batch: int) -> None:
    """Raise `TypeError` for what is no generator, and `ValueError` for a list that does not have one for each of the B
    images."""
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, or a list of them, got {type(one).__name__}")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"give one generator, or one for each of the {batch} images; got {len(generator)}")


def latent_shape(
    config: Any, scale_factor: int, batch: int, height: int | None, width: int | None, latents: Tensor | None
) -> tuple[int, int, int, int]:
    """The shape [B, c, H, W] of the latents to draw.

    Args:
        config: the transformer's configuration.
        scale_factor: pixels along the side of a latent.
        batch: B.
        height, width: in pixels; None: those of the latents if given, otherwise as the transformer was trained.
        latents: the user's own, whose shape is checked; None: there are none.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size that is not a multiple of what the transformer draws, or latents of another shape.
    """
    own = config.sample_size
    rows, columns = (own, own) if isinstance(own, int) else own
    if latents is not None and latents.dim() == 4:
        rows, columns = latents.shape[-2:]
    unit = config.patch_size * scale_factor
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            _check_whole(name, size)
        if size is not None and (size < 1 or size % unit):
            raise ValueError(f"{name} must be a positive multiple of {unit} pixels, got {size}")
    rows = rows if height is None else height // scale_factor
    columns = columns if width is None else width // scale_factor
    shape = (batch, config.in_channels, rows, columns)
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents must have the shape {list(shape)} here, got {list(latents.shape)}")
    return shape
