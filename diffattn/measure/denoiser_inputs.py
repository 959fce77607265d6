"""Synthetic arguments of one denoiser call, whose duration does not depend on their values.

Shapes: B batch, c channels, h rows and w columns of the latents (of the pixels where there is no VAE).
"""

from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from diffattn.measure.transformer_inputs import NOISE_LEVEL, TIMESTEP, Inputs, like, noise, transformer_inputs
from diffattn.models import DiT

TEXT_TOKENS = 77  # of CLIP
MICRO_CONDITIONS = 6  # SDXL's original size, crop and target size


def make_denoiser_inputs(model: nn.Module, height: int, width: int, batch: int, frames: int | None = None) -> Inputs:
    """Arguments of one call near the beginning of a run.

    Args:
        model: a UNet, ControlNet or transformer of diffusers, or a `DiT`.
        height, width: h and w.
        batch: B.
        frames: of a video's latents.

    Raises:
        ValueError: a class that is not known here, or one of its conditions; the message names it.
    """
    if isinstance(model, DiT):
        return _dit(model, height, width, batch)
    latents = (height, width) if frames is None else (frames, height, width)
    made = transformer_inputs(model, latents, batch)
    return _unet(model, height, width, batch) if made is None else made


def _dit(model: DiT, height: int, width: int, batch: int) -> Inputs:
    """(x, t, y); t stays on the CPU, as in the pipeline."""
    x = noise(model, batch, model.in_channels, height, width)
    to_data = model.config["time_direction"] == "noise_to_data"
    t = torch.full((batch,), 1 - NOISE_LEVEL if to_data else float(TIMESTEP))
    return (x, t, torch.zeros(batch, dtype=torch.long, device=x.device)), {}


def _unet(model: nn.Module, height: int, width: int, batch: int) -> Inputs:
    config: Any = model.config
    if "cross_attention_dim" not in config:
        raise ValueError(
            f"no inputs are known for a {type(model).__name__}; give the arguments of one call as `inputs`"
        )
    _check_conditions(model)
    text_width = config.cross_attention_dim
    if config.encoder_hid_dim_type is not None:
        text_width = config.encoder_hid_dim
    text_width = text_width if isinstance(text_width, int) else text_width[0]
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": noise(model, batch, TEXT_TOKENS, text_width),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - MICRO_CONDITIONS * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {
            "text_embeds": noise(model, batch, pooled),
            "time_ids": noise(model, batch, MICRO_CONDITIONS),
        }
    if config.num_class_embeds is not None:
        kwargs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=like(model).device)
    if isinstance(model, ControlNetModel):
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        shape = (batch, config.conditioning_channels, height * scale, width * scale)
        kwargs["controlnet_cond"] = noise(model, *shape)
    return (noise(model, batch, config.in_channels, height, width), TIMESTEP), kwargs


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
