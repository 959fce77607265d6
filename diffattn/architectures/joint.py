"""Transformers in which picture and text tokens attend to each other jointly: SD3, Flux and their relatives."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from diffattn.architectures.base import Size
from diffattn.architectures.transformers import (
    Time,
    TransformerFamily,
    grids_of,
    own_patch,
    packed,
    picture,
    read_once,
    square,
    text_tokens,
)
from diffattn.noise_level import UNKNOWN


def _sd3(model: Any, given: Mapping[str, Any]) -> Size:
    """SD3.5 Large's ControlNet gets tokens that the transformer has embedded, and a condition [B, C, h, w]."""
    if given["hidden_states"].ndim == 4:
        return picture(model, given)
    height, width = given["controlnet_cond"].shape[-2:]
    return Size(height, width)


def _aura_flow(model: Any, given: Mapping[str, Any]) -> Size:
    """Registers precede the text."""
    size = picture(model, given)
    return size._replace(num_context=size.num_context + model.register_tokens.shape[1])


def _chroma(model: Any, given: Mapping[str, Any]) -> Size:
    """Layers are masked by the outer product of the mask [B, text + picture] with itself, so queries with equal entries
    have equal masks."""
    size, mask = packed(model, given), given.get("attention_mask")
    if mask is None:
        return size
    start = size.num_context
    same = read_once(mask, lambda x: bool((x[:, start:] == x[:, start : start + 1]).all()))
    return size._replace(same_mask=same)


def _flux3(model: Any, given: Mapping[str, Any]) -> Size:
    """References come in a separate argument."""
    size, ids = packed(model, given), given.get("image_cond_ids")
    return size if ids is None else size._replace(references=tuple(read_once(ids, grids_of)))


def _qwen(model: Any, given: Mapping[str, Any]) -> Size:
    """`img_shapes` has one entry per sample: (frames, rows, columns), or several of these, of which the first is drawn;
    Qwen-Image-Layered draws all of them, at the same size."""
    shapes = given["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    grids = [(frames * rows, columns) for frames, rows, columns in shapes]
    return Size(2 * grids[0][0], 2 * grids[0][1], references=tuple(grids[1:]), num_context=text_tokens(given))


def _qwen21(model: Any, given: Mapping[str, Any]) -> Size:
    """The picture is the last of `img_shapes`. Text and references before it have separate calls, which do not see the
    picture; to its queries they are keys. One slot of the encoder for a reference is four tokens."""
    *references, (frames, rows, columns) = given["img_shapes"][0]
    before = given["encoder_hidden_states"].shape[1] + sum(map(prod, references)) * 3 // 4
    return Size(frames * rows, columns, num_context=before)


def _fibo(model: Any, given: Mapping[str, Any]) -> Size:
    """Every latent pixel is a token."""
    size = packed(model, given)
    return size._replace(height=size.height // 2, width=size.width // 2)


def _fibo2(model: Any, given: Mapping[str, Any]) -> Size:
    """The text is squeezed into gist tokens, more of them for longer prompts. They precede the picture, or follow it if
    the prompts of a batch have different numbers of them."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count  # not in older versions

    config, mask, text = model.config, given.get("encoder_attention_mask"), given["encoder_hidden_states"]
    lengths = [text.shape[2]] if mask is None else read_once(mask, _lengths)
    gist = compute_gist_count(
        lengths,
        config.min_num_gist_tokens,
        config.max_num_gist_tokens,
        config.gist_step,
        config.gist_min_text_len,
        config.gist_max_text_len,
    )
    patch, references = config.patch_size, given.get("context_latents") or []
    grids = tuple((x.shape[-2] // patch, x.shape[-1] // patch) for x in references)
    height, width = given["hidden_states"].shape[-2:]
    return Size(height, width, None, grids, max(gist), context_first=len(set(gist)) == 1)


def _lengths(mask: Tensor) -> list[int]:
    return mask.sum(dim=1).tolist()


JOINT_FAMILIES = (
    TransformerFamily(
        ("SD3Transformer2DModel", "SD3ControlNetModel"),
        size_of=_sd3,
        patch=own_patch,
        entry_name="time_text_embed",
        context="last",
        rotated=False,
    ),
    TransformerFamily(
        ("AuraFlowTransformer2DModel",),
        size_of=_aura_flow,
        patch=own_patch,
        entry_name="pos_embed",
        context="first",
        rotated=False,
        time=Time(scale=1000),
    ),
    TransformerFamily(
        (
            "FluxTransformer2DModel",
            "FluxControlNetModel",
            "Flux2Transformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        size_of=packed,
        patch=square(2),
        entry_name="x_embedder",
        context="first",
        time=Time(scale=1000),
    ),
    TransformerFamily(
        ("ChromaTransformer2DModel",),
        size_of=_chroma,
        patch=square(2),
        entry_name="x_embedder",
        context="first",
        time=Time(scale=1000),
    ),
    TransformerFamily(
        ("Flux3Transformer2DModel",),
        size_of=_flux3,
        patch=square(2),
        entry_name="timestep_embedder",
        context="first",
        time=Time(scale=1000),
        others=r"^(txt_mode_blocks|mode_blocks\.image_cond)\.",
    ),
    TransformerFamily(
        ("BriaTransformer2DModel",),
        size_of=packed,
        patch=square(2),
        entry_name="x_embedder",
        context="first",
    ),
    TransformerFamily(
        ("BriaFiboTransformer2DModel",),
        size_of=_fibo,
        patch=square(1),
        entry_name="x_embedder",
        context="first",
    ),
    TransformerFamily(
        ("BriaFibo2Transformer2DModel",),
        size_of=_fibo2,
        patch=own_patch,
        entry_name="x_embedder",
        context="first",
        time=Time(scale=1000),
        others=r"^perceiver\.|cross_attention$",
    ),
    TransformerFamily(
        ("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
        size_of=_qwen,
        patch=square(2),
        entry_name="img_in",
        context="first",
        time=Time(scale=1000),
    ),
    TransformerFamily(
        ("QwenImage21Transformer2DModel",),
        size_of=_qwen21,
        patch=square(1),
        entry_name="img_in",
        context="first",
        keys_only=True,
        time=Time(scale=1000),
    ),
    TransformerFamily(
        ("PRXTransformer2DModel",),
        size_of=picture,
        patch=own_patch,
        entry_name="img_in",
        context="first",
        keys_only=True,
        time=Time(scale=1000),
    ),
    TransformerFamily(
        ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
        size_of=lambda model, given: picture(model, given)._replace(num_context=0),
        patch=own_patch,
        entry_name="pos_embed",
        training=UNKNOWN,  # its versions were trained on different schedules
        others=r"attn2$",
    ),
)
