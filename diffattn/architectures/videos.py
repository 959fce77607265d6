"""Transformers of videos, whose tokens form a grid of frames, rows and columns."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from diffattn.architectures import plain_attention as attention
from diffattn.architectures.transformers import Time, TransformerFamily, video
from diffattn.architectures.video_sizes import (
    channels_last,
    frames_first,
    packed_video,
    video_tokens,
    vision_of_text,
    with_history,
    with_several_texts,
)
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import (
    NUM_TRAIN_TIMESTEPS,
    QUARTER_LOG_SIGMA,
    Convention,
    Reading,
    TimeReader,
    discrete,
    dit_alphas_cumprod,
)

FROM_NOISE = Convention(
    lambda t: 1 - min(max(t / NUM_TRAIN_TIMESTEPS, 0.0), 1.0), lambda t: 0 <= t <= NUM_TRAIN_TIMESTEPS
)
"""Time steps that rise from noise to data, of a flow matching scheduler with `invert_sigmas`."""


class _WithDecoder(TransformerFamily):
    """The last single-stream blocks of Motif-Video, which see the tokens of the video twice and no text."""

    def layers(self, model: Any) -> Iterator[tuple[LayerSpec, nn.Module]]:
        first = len(model.single_transformer_blocks) - model.config.num_decoder_layers
        for spec, module in super().layers(model):
            place = re.match(r"single_transformer_blocks\.(\d+)\.attn$", spec.name)
            decodes = place is not None and int(place[1]) >= first
            yield (replace(spec, context="none", copies=2) if decodes else spec), module


class _SanaWM(TransformerFamily):
    """Three of four blocks are linear; in the fourth, child modules attend to the video and to the rays of a camera."""

    def layers(self, model: Any) -> Iterator[tuple[LayerSpec, Any]]:
        for name, module in model.named_modules():
            if any(
                kind.__name__ in ("SanaWMSoftmaxAttention", "SanaWMSoftmaxCamAttention")
                for kind in type(module).__mro__
            ):
                parent, _, child = name.rpartition(".")
                spec = LayerSpec(name, level=0, num_heads=model.config.num_attention_heads, head_dim=0, rotated=True)
                yield spec, attention.Slot(model.get_submodule(parent), child)


class _Cosmos(TransformerFamily):
    """Cosmos 1, the only one with learned positions, passes log(σ)/4; later ones the noise level itself."""

    def read_time(self, model: Any, time: Any, levels: TimeReader) -> Reading:
        if model.config.extra_pos_embed_type is None:
            return super().read_time(model, time, levels)
        return levels.read(time, QUARTER_LOG_SIGMA)


def _cubes(config: Any) -> Sequence[int]:
    """Patches of `patch_size_t` frames (None: 1) and squares of `patch_size`."""
    return (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)


def _own_cubes(config: Any) -> Sequence[int]:
    """Patches of the configuration's `patch_size` in all three directions."""
    return config.patch_size


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
        patch=_own_cubes,
        entry_name="patch_embedding",
        others=r"attn2$|^face_adapter",
    ),
    TransformerFamily(
        ("AnyFlowTransformer3DModel",),
        size_of=frames_first,
        patch=_own_cubes,
        entry_name="patch_embedding",
        others=r"attn2$",
    ),
    TransformerFamily(
        ("HeliosTransformer3DModel",),
        size_of=with_history({"latents_history_long": 4, "latents_history_mid": 2, "latents_history_short": 1}),
        patch=_own_cubes,
        entry_name="patch_embedding",
        references_first=True,
        others=r"attn2$",
    ),
    TransformerFamily(
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        size_of=frames_first,
        patch=_cubes,
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
        size_of=lambda model, given: with_several_texts(model, given)._replace(same_mask=True),
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        others=r"^context_embedder",
    ),
    TransformerFamily(
        ("HunyuanVideoFramepackTransformer3DModel",),
        size_of=with_history(
            {"latents_history_4x": 4, "latents_history_2x": 2, "latents_clean": 1},
            texts=("image_embeds", "encoder_hidden_states"),
        ),
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        references_first=True,
        others=r"^context_embedder",
    ),
    _WithDecoder(
        ("MotifVideoTransformer3DModel",),
        size_of=with_several_texts,
        patch=_cubes,
        entry_name="x_embedder",
        context="last",
        others=r"cross_attn$",
    ),
    TransformerFamily(
        ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
        size_of=video_tokens,
        patch=_cubes,
        entry_name="proj_in",
        others=r"attn2$|audio",
    ),
    _SanaWM(
        ("SanaWMTransformer3DModel",),
        size_of=video,
        patch=_own_cubes,
        entry_name="x_embedder",
    ),
    TransformerFamily(
        ("MochiTransformer3DModel",),
        size_of=video,
        patch=_cubes,
        entry_name="patch_embed",
        context="last",
        training=FROM_NOISE,
    ),
    TransformerFamily(
        ("Kandinsky5Transformer3DModel",),
        size_of=channels_last,
        patch=_own_cubes,
        entry_name="visual_embeddings",
        others=r"^text_transformer_blocks|\.cross_attention$",
    ),
    TransformerFamily(
        ("Kandinsky6Transformer3DModel",),
        size_of=channels_last,
        patch=_own_cubes,
        entry_name="video_text_embeddings",
        others=r"^(?!visual_transformer_blocks\.\d+\.video_dec_block\.self_attention$)",
    ),
    TransformerFamily(
        ("AllegroTransformer3DModel",),
        size_of=video,
        patch=_cubes,
        entry_name="pos_embed",
        training=discrete(dit_alphas_cumprod()),
        others=r"attn2$",
    ),
    TransformerFamily(
        ("EasyAnimateTransformer3DModel",),
        size_of=with_several_texts,
        patch=_cubes,
        entry_name="proj",
        context="first",
    ),
    TransformerFamily(
        ("LatteTransformer3DModel",),
        size_of=video,
        patch=lambda config: (config.patch_size, config.patch_size),  # frames are folded into the batch
        entry_name="pos_embed",
        rotated=False,
        training=discrete(dit_alphas_cumprod()),
        temporal=r"^temporal_transformer_blocks",
        others=r"attn2$",
    ),
    _Cosmos(
        ("CosmosTransformer3DModel",),
        size_of=video,
        patch=_own_cubes,
        entry_name="patch_embed",
        time=Time(scale=1000),
        others=r"attn2$",
    ),
    _Cosmos(
        ("CosmosControlNetModel",),
        size_of=lambda model, given: video(model, {"hidden_states": given["latents"]}),
        patch=_own_cubes,
        entry_name="patch_embed",
        time=Time(scale=1000),
        sample_name="latents",
        others=r"attn2$",
    ),
    TransformerFamily(
        ("Cosmos3OmniTransformer",),
        size_of=vision_of_text,
        patch=lambda config: (1, config.latent_patch_size, config.latent_patch_size),
        entry_name="embed_tokens",
        context="first",
        keys_only=True,
        sample_name="vision_tokens",
        time_of=lambda given: given["vision_timesteps"][:1],  # the same for all noisy tokens
    ),
    TransformerFamily(
        ("MiniMaxH3Transformer3DModel",),
        size_of=packed_video,
        patch=_own_cubes,
        entry_name="proj_in",
        context="first",
        time=Time(scale=1000, from_data=True),
        time_of=lambda given: given["timestep"][
            given["timestep_indices"][-1]
        ],  # rows have their own; the video is last
        others=r"^token_refiner",
    ),
)
