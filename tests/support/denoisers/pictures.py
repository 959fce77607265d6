"""Tiny transformers of pictures beside SD3 and Flux."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor

from support.denoisers import picture_configs as config
from support.denoisers import picture_inputs as given
from support.denoisers.case import Case, Inputs
from support.denoisers.picture_inputs import COLUMNS, GRID, ROWS, TEXT

TWO_LENGTHS = "texts of two lengths"


class Controlling(Case):
    """A ControlNet of Z-Image, which shares parts of its transformer."""

    def build(self, seed: int = 0, **config_of_transformer: Any) -> Any:
        network = super().build(seed)
        transformer = ZImageTransformer2DModel(**config.Z_IMAGE | config_of_transformer).eval()
        torch.nn.init.normal_(transformer.x_pad_token)
        return ZImageControlNetModel.from_transformer(network, transformer)


class Masked(Case):
    """UVit's noise is masked tokens, and it has no time."""

    def call(self, model: Any, given: Mapping[str, Any], level: float | None = None) -> Tensor:
        level = self.level if level is None else level
        ids = given["input_ids"].clone().flatten(1)
        ids[:, : round(level * ids.shape[1])] = model.config.vocab_size - 1
        with torch.no_grad():
            return model(**{**given, "input_ids": ids.view_as(given["input_ids"])})


def of_scheduler(level: float) -> float:
    return 1000 * level


def fraction(level: float) -> float:
    return level


def of_data(level: float) -> float:
    return 1 - level


def rising(level: float) -> float:
    return 1000 * (1 - level)


def one_less(level: float) -> float:
    return 1000 * level - 1


def joint(name: str, config: Mapping[str, Any], inputs: Inputs, **other: Any) -> Case:
    """A case of 8x6 tokens after or before a text, whose time is the scheduler's; `other` says what differs."""
    facts: dict[str, Any] = {"grid": GRID, "num_layers": 2, "context": TEXT, "time": of_scheduler}
    return Case(name, config, inputs, **facts | other)


def z_image(name: str, inputs: Inputs) -> Case:
    """24 tokens of padding stand between those of the picture and the text's."""
    return joint(
        name, config.Z_IMAGE, inputs, grid=(1, 14, 12), num_layers=3, context=24 + 64, time=of_data, time_name="t",
        output=lambda out: torch.stack(out[0]), enlarged={"axes_lens": [1024, 64, 64]},
    )  # fmt: skip


hidream = partial(
    joint,
    config=config.HIDREAM,
    enlarged={"max_resolution": (80, 80)},
    time_name="timesteps",
    batch_dims={"encoder_hidden_states_llama3": 1},
)
plain = partial(joint, context=0)
lumina2 = partial(joint, config=config.LUMINA2, time=of_data, num_layers=3, enlarged={"axes_lens": (512, 64, 64)})
cogview4 = partial(joint, config=config.COGVIEW | {"rope_axes_dim": (16, 16)})
krea2 = partial(joint, config=config.KREA2, time=fraction, enlarged={"intermediate_size": 64})
ideogram4 = partial(joint, config=config.IDEOGRAM4, time=of_data, enlarged={"intermediate_size": 64})
omnigen = partial(
    joint, config=config.OMNIGEN, context=TEXT + 1, time=rising,
    enlarged={"pos_embed_max_size": 64, "max_position_embeddings": 4096, "intermediate_size": 44},
)  # fmt: skip
joy = partial(joint, config=config.JOY, grid=(1, *GRID), enlarged={"num_attention_heads": 4, "hidden_size": 48})
nucleus = partial(joint, config=config.NUCLEUS, grid=(1, *GRID), time=fraction)

PICTURES = (
    lumina2("Lumina2Transformer2DModel", inputs=given.lumina2),
    lumina2(f"Lumina2Transformer2DModel {TWO_LENGTHS}", inputs=partial(given.lumina2, shorter=2)),
    z_image("ZImageTransformer2DModel", given.z_image),
    z_image(f"ZImageTransformer2DModel {TWO_LENGTHS}", partial(given.z_image, shorter=20)),
    Controlling(
        "ZImageControlNetModel", config.Z_CONTROL, given.z_image_control, grid=(1, 14, 12), num_layers=4,
        context=24 + 64, time=of_data, time_name="t", fixed={},
        output=lambda out: torch.stack(tuple(out.values()), dim=1), enlarged={"axes_lens": [1024, 64, 64]},
    ),
    joint("CogView3PlusTransformer2DModel", config.COGVIEW | {"pos_embed_max_size": 64}, given.cogview),
    cogview4("CogView4Transformer2DModel", inputs=given.cogview),
    cogview4("CogView4Transformer2DModel masked", inputs=given.cogview4_masked),
    hidream("HiDreamImageTransformer2DModel", inputs=given.hidream, grid=(ROWS, ROWS), context=10),
    hidream("HiDreamImageTransformer2DModel not square", inputs=partial(given.hidream, square=False), context=10 + 16),
    joint(
        "HunyuanImageTransformer2DModel", config.HUNYUAN, given.hunyuan, context=TEXT + 3,
        enlarged={"attention_head_dim": 16, "rope_axes_dim": (8, 8)},
    ),
    joint(
        "HunyuanImageTransformer2DModel refiner",
        config.HUNYUAN | {"patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4), "text_embed_2_dim": None},
        given.hunyuan_refiner, grid=(1, *GRID),
    ),
    plain("LuminaNextDiT2DModel", config.LUMINA_NEXT, given.lumina_next, time=of_data),
    krea2("Krea2Transformer2DModel", inputs=given.krea2),
    krea2(f"Krea2Transformer2DModel {TWO_LENGTHS}", inputs=partial(given.krea2, shorter=2)),
    ideogram4("Ideogram4Transformer2DModel", inputs=given.ideogram4),
    ideogram4(f"Ideogram4Transformer2DModel {TWO_LENGTHS}", inputs=partial(given.ideogram4, shorter=2)),
    joint("ErnieImageTransformer2DModel", config.ERNIE, given.ernie, enlarged={"ffn_hidden_size": 64}),
    joint(
        "GlmImageTransformer2DModel", config.COGVIEW | {"prior_vq_quantizer_codebook_size": 16}, given.glm,
        time=one_less,
    ),
    omnigen("OmniGenTransformer2DModel", inputs=given.omnigen),
    omnigen("OmniGenTransformer2DModel padded", inputs=partial(given.omnigen, shorter=2)),
    joy("JoyImageEditTransformer3DModel", inputs=given.joy),
    joy("JoyImageEditTransformer3DModel with another picture", inputs=partial(given.joy, items=2),
        references=((1, ROWS, COLUMNS),)),
    joy("JoyImageEditPlusTransformer3DModel", inputs=given.joy_plus, references=((1, 4, 5),)),
    joy("JoyImageEditPlusTransformer3DModel padded", inputs=partial(given.joy_plus, padding=2),
        context=TEXT + 2, references=((1, 4, 5),)),
    nucleus("NucleusMoEImageTransformer2DModel", inputs=given.nucleus),
    nucleus("NucleusMoEImageTransformer2DModel masked", inputs=partial(given.nucleus, masked=True)),
    joint(
        "UniDiffuserModel", config.UNIDIFFUSER, given.unidiffuser, grid=(ROWS, ROWS), num_layers=3, context=TEXT + 4,
        time_name="timestep_img", fixed={}, enlarged={"sample_size": 64, "num_text_tokens": 96},
    ),
    Masked("UVit2DModel", config.UVIT, given.uvit, grid=(16, 16), num_layers=2, time=of_scheduler),
    plain(
        "Transformer2DModel of patches",
        config.PLAIN | {"in_channels": 4, "patch_size": 2, "sample_size": 16, "norm_type": "ada_norm_zero",
                        "num_embeds_ada_norm": 1000},
        given.plain, grid=(ROWS, ROWS),
    ),
    plain(
        "Transformer2DModel of latents", config.PLAIN | {"in_channels": 4, "norm_num_groups": 2}, given.plain_latents
    ),
    plain(
        "Transformer2DModel of tokens", config.PLAIN | {"num_vector_embeds": 20, "sample_size": ROWS},
        given.plain_tokens, grid=(ROWS, ROWS), enlarged={"sample_size": 4 * ROWS},
    ),
    plain(
        "DreamLiteTransformer2DModel",
        config.PLAIN | {"in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 16},
        given.plain_with_text,
    ),
    plain("DreamLiteUNetModel", config.DREAM_LITE, given.dream_lite, grid=(ROWS, 2 * COLUMNS), num_layers=4),
)  # fmt: skip
