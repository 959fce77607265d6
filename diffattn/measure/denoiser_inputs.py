"""Made-up arguments of one denoiser call: how long it takes does not depend on their values.

Shapes: B batch, c channels, h rows and w columns of the latents (of the pixels where there is no VAE).
"""

from typing import Any

import torch
from diffusers import ControlNetModel, DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from diffattn.measure.unets import TEXT_TOKENS, TIMESTEP
from diffattn.models import DiT

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of `forward`."""

NOISE_LEVEL = 0.9
"""Where on the way from noise (1) to data (0) the call is: every preset accelerates there."""

PIXART_TEXT_TOKENS = 300  # of PixArt-Sigma; PixArt-alpha has 120
MICRO_CONDITIONS = 6  # SDXL's original size, crop and target size


def make_denoiser_inputs(model: nn.Module, height: int, width: int, batch: int) -> Inputs:
    """Arguments of one call near the beginning of a run.

    Args:
        model: a UNet, ControlNet, DiT or PixArt transformer of diffusers, or a `DiT`.
        height, width: h and w.
        batch: B.

    Raises:
        ValueError: the model takes a condition that is not known here; the message names it.
    """
    if isinstance(model, DiT):
        return _dit(model, height, width, batch)
    if isinstance(model, DiTTransformer2DModel):
        labels = torch.zeros(batch, dtype=torch.long, device=_like(model).device)
        return _latents(model, height, width, batch), {"timestep": _times(model, batch), "class_labels": labels}
    if isinstance(model, PixArtTransformer2DModel):
        return _pixart(model, height, width, batch)
    return _unet(model, height, width, batch)


def _dit(model: DiT, height: int, width: int, batch: int) -> Inputs:
    """(x, t, y); t stays on the CPU, as in the pipeline."""
    x = _noise(model, batch, model.in_channels, height, width)
    to_data = model.config["time_direction"] == "noise_to_data"
    t = torch.full((batch,), 1 - NOISE_LEVEL if to_data else float(TIMESTEP))
    return (x, t, torch.zeros(batch, dtype=torch.long, device=x.device)), {}


def _pixart(model: PixArtTransformer2DModel, height: int, width: int, batch: int) -> Inputs:
    config: Any = model.config
    text_width = config.caption_channels or config.cross_attention_dim
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes = {"resolution": _noise(model, batch, 2), "aspect_ratio": _noise(model, batch, 1)}
    return _latents(model, height, width, batch), {
        "encoder_hidden_states": _noise(model, batch, PIXART_TEXT_TOKENS, text_width),
        "encoder_attention_mask": torch.ones(batch, PIXART_TEXT_TOKENS, device=_like(model).device),
        "timestep": _times(model, batch),
        "added_cond_kwargs": sizes,
        "return_dict": False,
    }


def _unet(model: nn.Module, height: int, width: int, batch: int) -> Inputs:
    config: Any = model.config
    _check_conditions(model)
    text_width = config.cross_attention_dim
    if config.encoder_hid_dim_type is not None:
        text_width = config.encoder_hid_dim
    text_width = text_width if isinstance(text_width, int) else text_width[0]
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": _noise(model, batch, TEXT_TOKENS, text_width),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - MICRO_CONDITIONS * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {
            "text_embeds": _noise(model, batch, pooled),
            "time_ids": _noise(model, batch, MICRO_CONDITIONS),
        }
    if config.num_class_embeds is not None:
        kwargs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=_like(model).device)
    if isinstance(model, ControlNetModel):
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        shape = (batch, config.conditioning_channels, height * scale, width * scale)
        kwargs["controlnet_cond"] = _noise(model, *shape)
    return (_noise(model, batch, config.in_channels, height, width), TIMESTEP), kwargs


def _check_conditions(model: nn.Module) -> None:
    """Raise `ValueError` for conditions that `_unet` does not make."""
    known = {
        "addition_embed_type": (None, "text", "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
    }
    config: Any = model.config
    for name, allowed in known.items():
        if config[name] not in allowed:
            raise ValueError(
                f"no inputs are known for a {type(model).__name__} with {name}={config[name]!r}; "
                "give the arguments of one call as `inputs`"
            )


def _latents(model: Any, height: int, width: int, batch: int) -> tuple[Tensor]:
    return (_noise(model, batch, model.config.in_channels, height, width),)


def _times(model: nn.Module, batch: int) -> Tensor:
    """[B], one step expanded as in the pipelines."""
    return torch.tensor([TIMESTEP], device=_like(model).device).expand(batch)


def _noise(model: nn.Module, *shape: int) -> Tensor:
    """The same every time; drawn apart from torch's own random numbers, which stay as they are."""
    like = _like(model)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


def _like(model: nn.Module) -> Tensor:
    """A weight in the dtype of the model's activations."""
    return next(p for p in model.parameters() if p.is_floating_point())
