"""Transformers of videos, whose tokens form a grid of frames, rows and columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffattn.architectures.base import Size
from diffattn.architectures.transformers import TransformerFamily, text_tokens, video

from diffattn.methods.base import Grid
from diffattn.noise_level import NUM_TRAIN_TIMESTEPS, Convention

FROM_NOISE = Convention(
    lambda t: 1 - min(max(t / NUM_TRAIN_TIMESTEPS, 0.0), 1.0), lambda t: 0 <= t <= NUM_TRAIN_TIMESTEPS
)
"""Time steps that rise from noise to data, of a flow matching scheduler with `invert_sigmas`."""


def frames_first(model: Any, given: Mapping[str, Any]) -> Size:
    """Of latents [B, f, C, h, w]."""
    _, frames, _, height, width = given["hidden_states"].shape
    return Size(height, width, frames, num_context=text_tokens(given))


def channels_last(model: Any, given: Mapping[str, Any]) -> Size:
    """Of latents [B, f, h, w, C]."""
    _, frames, height, width, _ = given["hidden_states"].shape
    return Size(height, width, frames)


def with_several_texts(model: Any, given: Mapping[str, Any]) -> Size:
    """Of latents [B, C, f, h, w] with tokens of two texts and a picture."""
    size = video(model, given)
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return size._replace(num_context=sum(text_tokens(given, name) for name in names))


def with_history(model: Any, given: Mapping[str, Any]) -> Size:
    """Of latents [B, C, f, h, w] with earlier ones before them, the farther the coarser (FramePack)."""
    size = video(model, given)
    references = []
    for name, factor in (("latents_history_4x", 4), ("latents_history_2x", 2), ("latents_clean", 1)):
        if given.get(name) is not None:
            patch = (factor, 2 * factor, 2 * factor)
            pixels = given[name].shape[-3:]
            references.append(tuple(-(-p // q) for p, q in zip(pixels, patch, strict=True)))
    context = text_tokens(given) + text_tokens(given, "image_embeds")
    return size._replace(references=tuple(references), num_context=context)


def _cubes(config: Any) -> Sequence[int]:
    """Patches of `patch_size_t` frames (None: 1) and squares of `patch_size`."""
    return (config.patch_size_t or 1, config.patch_size, config.patch_size)


VIDEO_FAMILIES = (
    TransformerFamily(
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        size_of=video,
        patch=lambda config: config.patch_size,
        entry_name="patch_embedding",
        others=r"attn2$|^face_adapter",
    ),
    TransformerFamily(
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        size_of=frames_first,
        patch=lambda config: (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size),
        entry_name="patch_embed",
        context="first",
        training=None,
    ),
    TransformerFamily(
        ("HunyuanVideoTransformer3DModel",),
        size_of=video,
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        others=r"^context_embedder",
    ),
    TransformerFamily(
        ("HunyuanVideo15Transformer3DModel",),
        size_of=with_several_texts,
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        outer_mask=True,
        others=r"^context_embedder",
    ),
    TransformerFamily(
        ("HunyuanVideoFramepackTransformer3DModel",),
        size_of=with_history,
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        references_first=True,
        others=r"^context_embedder",
    ),
    TransformerFamily(
        ("MochiTransformer3DModel",),
        size_of=video,
        patch=lambda config: (1, config.patch_size, config.patch_size),
        entry_name="patch_embed",
        context="last",
        training=FROM_NOISE,
    ),
    TransformerFamily(
        ("Kandinsky5Transformer3DModel",),
        size_of=channels_last,
        patch=lambda config: config.patch_size,
        entry_name="visual_embeddings",
        others=r"^text_transformer_blocks|\.cross_attention$",
    ),
)
