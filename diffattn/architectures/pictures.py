"""Transformers of pictures beside SD3 and Flux: Lumina, Z-Image, CogView, HiDream and others."""

from collections.abc import Sequence
from typing import Any

from diffattn.architectures.picture_sizes import (
    before_text,
    behind_each_text,
    behind_prompt,
    packed_behind_text,
    padded,
    placed_behind_text,
    shaped,
    with_cache,
    with_other_items,
    with_other_pictures,
    with_three_texts,
    with_two_texts,
    without_text,
)
from diffattn.architectures.transformers import RISING_FLOW, Time, TransformerFamily, own_patch, picture, square


def any_patch(config: Any) -> Sequence[int]:
    """The configuration's `patch_size`, of pictures or of videos."""
    return config.patch_size


PICTURE_FAMILIES = (
    TransformerFamily(
        ("Lumina2Transformer2DModel",),
        size_of=behind_each_text,
        patch=own_patch,
        entry_name="time_caption_embed",
        context="first",
        time=Time(scale=1000, from_data=True),
        others=r"^context_refiner",
    ),
    TransformerFamily(
        ("ZImageTransformer2DModel", "ZImageControlNetModel"),
        size_of=padded,
        patch=lambda config: (config.all_f_patch_size[0], config.all_patch_size[0], config.all_patch_size[0]),
        entry_name="t_embedder",
        context="last",
        time=Time(scale=1000, from_data=True),
        others=r"^(context|siglip)_refiner",
        sample_name="x",
        time_name="t",
    ),
    TransformerFamily(
        ("CogView3PlusTransformer2DModel",),
        size_of=picture,
        patch=own_patch,
        entry_name="patch_embed",
        context="first",
        rotated=False,
        training=None,
    ),
    TransformerFamily(
        ("CogView4Transformer2DModel",),
        size_of=picture,
        patch=own_patch,
        entry_name="patch_embed",
        context="first",
        outer_mask=True,
    ),
    TransformerFamily(
        ("HiDreamImageTransformer2DModel",),
        size_of=with_three_texts,
        patch=own_patch,
        entry_name="x_embedder",
        context="last",
        time_name="timesteps",
    ),
    TransformerFamily(
        ("HunyuanImageTransformer2DModel",),
        size_of=with_two_texts,
        patch=any_patch,
        entry_name="x_embedder",
        context="last",
        others=r"^context_embedder",
    ),
    TransformerFamily(
        ("LuminaNextDiT2DModel",),
        size_of=without_text,
        patch=own_patch,
        entry_name="patch_embedder",
        time=Time(scale=1000, from_data=True),
        others=r"attn2$",
    ),
    TransformerFamily(
        ("Krea2Transformer2DModel",),
        size_of=placed_behind_text,
        patch=square(2),
        entry_name="time_embed",
        context="first",
        time=Time(scale=1000),
        others=r"^text_fusion",
    ),
    TransformerFamily(
        ("Ideogram4Transformer2DModel",),
        size_of=packed_behind_text,
        patch=square(2),
        entry_name="input_proj",
        context="first",
        outer_mask=True,
        time=Time(scale=1000, from_data=True),
    ),
    TransformerFamily(
        ("ErnieImageTransformer2DModel",),
        size_of=before_text("text_bth"),
        patch=own_patch,
        entry_name="x_embedder",
        context="last",
    ),
    TransformerFamily(
        ("GlmImageTransformer2DModel",),
        size_of=with_cache,
        patch=own_patch,
        entry_name="image_projector",
        context="first",
        outer_mask=True,
        time=Time(offset=1),
    ),
    TransformerFamily(
        ("OmniGenTransformer2DModel",),
        size_of=behind_prompt,
        patch=own_patch,
        entry_name="patch_embedding",
        context="first",
        outer_mask=True,
        training=RISING_FLOW,
        is_told=False,
    ),
    TransformerFamily(
        ("JoyImageEditTransformer3DModel",),
        size_of=with_other_items,
        patch=any_patch,
        entry_name="img_in",
        context="last",
    ),
    TransformerFamily(
        ("JoyImageEditPlusTransformer3DModel",),
        size_of=with_other_pictures,
        patch=any_patch,
        entry_name="condition_embedder",
        context="last",
    ),
    TransformerFamily(
        ("NucleusMoEImageTransformer2DModel",),
        size_of=shaped,
        patch=lambda config: (1, 2, 2),
        entry_name="img_in",
        context="last",
        keys_only=True,
        time=Time(scale=1000),
    ),
)
