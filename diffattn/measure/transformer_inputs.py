"""Synthetic arguments of one call of a transformer of diffusers, as its pipeline would pass them.

Shapes: B batch, c channels, f frames, h rows and w columns of the latents.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.machine import execution_device

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of `forward`."""

TIMESTEP = 900  # of a scheduler with 1000 of them
NOISE_LEVEL = 0.9
"""The noise level of the call, from 1 (noise) to 0 (data): every preset accelerates there."""

PIXART_TEXT_TOKENS = 300  # of PixArt-Sigma; PixArt-alpha has 120
SD3_TEXT_TOKENS = 77 + 256  # of CLIP and T5
FLUX_TEXT_TOKENS = 512
Z_IMAGE_TEXT_TOKENS = 128  # of a prompt of a few sentences; they are not padded to a fixed length
WAN_TEXT_TOKENS = 512
GUIDANCE = 3.5


def transformer_inputs(model: Any, latents: tuple[int, ...], batch: int) -> Inputs | None:
    """Arguments of one call near the beginning of a run; None for a class that is not known here.

    Args:
        model: the transformer.
        latents: (h, w), or (f, h, w) of a video.
        batch: B.
    """
    names = (kind.__name__ for kind in type(model).__mro__)
    make = next((MAKERS[name] for name in names if name in MAKERS), None)
    if make is None:
        return None
    given = make(model, latents, batch)
    first = (given.pop("hidden_states"),) if "hidden_states" in given else ()
    return first, {**given, "return_dict": False}


def _pixart(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    config = model.config
    text_width = config.caption_channels or config.cross_attention_dim
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes = {"resolution": noise(model, batch, 2), "aspect_ratio": noise(model, batch, 1)}
    return {
        "hidden_states": _latents(model, latents, batch),
        "encoder_hidden_states": noise(model, batch, PIXART_TEXT_TOKENS, text_width),
        "encoder_attention_mask": torch.ones(batch, PIXART_TEXT_TOKENS, device=like(model).device),
        "timestep": times(model, batch),
        "added_cond_kwargs": sizes,
    }


def _dit(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    labels = torch.zeros(batch, dtype=torch.long, device=like(model).device)
    hidden = _latents(model, latents, batch)
    return {"hidden_states": hidden, "timestep": times(model, batch), "class_labels": labels}


def _sd3(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latents(model, latents, batch),
        "encoder_hidden_states": noise(model, batch, SD3_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": noise(model, batch, config.pooled_projection_dim),
        "timestep": times(model, batch),
    }


def _flux(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    """A token is 2x2 pixels of the latents, [B, h/2·w/2, 4c]; `img_ids` are 0, row, column."""
    config, place = model.config, like(model)
    rows, columns = (n // 2 for n in latents)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    given = {
        "hidden_states": noise(model, batch, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(model, batch, FLUX_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": noise(model, batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), NOISE_LEVEL, device=place.device, dtype=place.dtype),
        "img_ids": ids.flatten(0, 1).to(place.device, place.dtype),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3, device=place.device, dtype=place.dtype),
    }
    if config.guidance_embeds:
        given["guidance"] = torch.full((batch,), GUIDANCE, device=place.device)
    return given


def _z_image(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Lists with an entry for each sample; the time is 1 - t/1000."""
    config = model.config
    height, width = latents
    return {
        "x": list(noise(model, batch, config.in_channels, 1, height, width)),
        "t": torch.full((batch,), 1 - NOISE_LEVEL, device=like(model).device),
        "cap_feats": list(noise(model, batch, Z_IMAGE_TEXT_TOKENS, config.cap_feat_dim)),
    }


def _wan(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(model, latents, batch),
        "encoder_hidden_states": noise(model, batch, WAN_TEXT_TOKENS, model.config.text_dim),
        "timestep": times(model, batch),
    }


def _cogvideox(model: Any, latents: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Frames precede channels, [B, f, c, h, w]. Versions with rotary embeddings are given none."""
    config = model.config
    frames, height, width = latents
    return {
        "hidden_states": noise(model, batch, frames, config.in_channels, height, width),
        "encoder_hidden_states": noise(model, batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": times(model, batch),
    }


MAKERS: Mapping[str, Callable[[Any, tuple[int, ...], int], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
}
"""Class of diffusers -> named arguments, `return_dict` excepted."""


def _latents(model: Any, latents: tuple[int, ...], batch: int) -> Tensor:
    """[B, c, h, w] or [B, c, f, h, w]."""
    return noise(model, batch, model.config.in_channels, *latents)


def times(model: nn.Module, batch: int) -> Tensor:
    """[B], one step expanded as in the pipelines."""
    return torch.tensor([TIMESTEP], device=like(model).device).expand(batch)


def noise(model: nn.Module, *shape: int) -> Tensor:
    """The same noise every time, without touching torch's global random numbers."""
    place = like(model)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(place.device, place.dtype)


def like(model: nn.Module) -> Tensor:
    """A tensor in the dtype of the model's activations, where it computes."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(0, dtype=dtype, device=execution_device(model))
