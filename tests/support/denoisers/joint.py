"""Tiny transformers of pictures and text together."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from support.denoisers.case import Case, area, normal, side

TEXT = 6
REFERENCE = (4, 5)


def words() -> int:
    """Tokens of the text."""
    return area(TEXT)


def grid(rows: int = 8, columns: int = 6) -> tuple[int, int]:
    """Of the picture's tokens, or of another's."""
    return side(rows), side(columns)


def latents(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, side(16), side(12), rng=rng),
        "encoder_hidden_states": normal(batch, words(), 32, rng=rng),
    }


def condition(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {"controlnet_cond": normal(batch, 4, side(16), side(12), rng=rng)}


def sd3(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return latents(batch, rng) | {"pooled_projections": normal(batch, 64, rng=rng)}


def sd3_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return sd3(batch, rng) | condition(batch, rng)


def sd35_large_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    tokens = {"hidden_states": normal(batch, area(48), 32, rng=rng), "pooled_projections": normal(batch, 64, rng=rng)}
    return tokens | condition(batch, rng)


def places(*grids: tuple[int, int], columns: int = 3) -> Tensor:
    """Picture, row and column of every token."""
    ids = []
    for number, grid in enumerate(grids):
        part = torch.zeros(*grid, columns)
        part[..., 0] = number
        part[..., 1] += torch.arange(grid[0])[:, None]
        part[..., 2] += torch.arange(grid[1])[None]
        ids.append(part.flatten(0, 1))
    return torch.cat(ids)


def text_mask(batch: int) -> Tensor:
    """The second sample's text is shorter, with padding behind it."""
    return torch.arange(words()).expand(batch, words()) < words() - 2 * torch.arange(batch)[:, None]


def tokens(batch: int, rng: torch.Generator, *grids: tuple[int, int], columns: int = 3) -> dict[str, Any]:
    ids = places(*(grids or (grid(),)), columns=columns)
    return {
        "hidden_states": normal(batch, len(ids), 4, rng=rng),
        "encoder_hidden_states": normal(batch, words(), 32, rng=rng),
        "img_ids": ids,
        "txt_ids": torch.zeros(words(), columns),
    }


def flux(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return tokens(batch, rng) | {"pooled_projections": normal(batch, 32, rng=rng)}


def kontext(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return tokens(batch, rng, grid(), grid(*REFERENCE)) | {"pooled_projections": normal(batch, 32, rng=rng)}


def flux_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = flux(batch, rng)
    mode = torch.arange(batch)[:, None]
    return given | {"controlnet_cond": normal(batch, area(48), 4, rng=rng), "controlnet_mode": mode}


def chroma(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = tokens(batch, rng)
    mask = torch.cat((text_mask(batch), torch.ones(batch, area(48), dtype=torch.bool)), dim=1)
    return given | {"attention_mask": mask.float()}  # its pipeline has zeros and ones, which are added to logits


def fibo(batch: int, rng: torch.Generator) -> dict[str, Any]:
    mask = torch.cat((text_mask(batch), torch.ones(batch, area(48), dtype=torch.bool)), dim=1)
    layers = [normal(batch, words(), 16, rng=rng) for _ in range(2)]
    kwargs = {"attention_mask": mask[:, None, None]}
    return tokens(batch, rng) | {"text_encoder_layers": layers, "joint_attention_kwargs": kwargs}


def fibo2(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, side(16), side(12), rng=rng),
        "encoder_hidden_states": normal(batch, 2, 12, 16, rng=rng),
    }


def fibo2_edit(batch: int, rng: torch.Generator) -> dict[str, Any]:
    """Prompts of different lengths, which are given different numbers of gist tokens, and a picture to edit."""
    mask = torch.arange(12).expand(batch, 12) < 12 - 8 * torch.arange(batch)[:, None]
    reference = normal(batch, 4, *(2 * n for n in grid(*REFERENCE)), rng=rng)
    return fibo2(batch, rng) | {"encoder_attention_mask": mask, "context_latents": [reference]}


def flux2(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = tokens(batch, rng, grid(), grid(*REFERENCE), columns=4)
    return given | {"guidance": torch.full((batch,), 3.5)}


def flux3(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return tokens(batch, rng, columns=4)


def flux3_edit(batch: int, rng: torch.Generator) -> dict[str, Any]:
    ids = places(grid(*REFERENCE), columns=4) + torch.tensor([10, 0, 0, 0])
    reference = normal(batch, len(ids), 4, rng=rng)
    return flux3(batch, rng) | {"image_cond_hidden_states": reference, "image_cond_ids": ids}


def qwen(batch: int, rng: torch.Generator, *references: tuple[int, int]) -> dict[str, Any]:
    shapes = [(1, *size) for size in (grid(), *references)]
    number = sum(rows * columns for _, rows, columns in shapes)
    return {
        "hidden_states": normal(batch, number, 16, rng=rng),
        "encoder_hidden_states": normal(batch, words(), 32, rng=rng),
        "encoder_hidden_states_mask": text_mask(batch),
        "img_shapes": [shapes] * batch,
    }


def qwen_edit(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return qwen(batch, rng, grid(*REFERENCE))


def qwen_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = qwen(batch, rng) | {"img_shapes": [(1, *grid())] * batch}
    return given | {"controlnet_cond": normal(batch, area(48), 16, rng=rng)}


def qwen21(batch: int, rng: torch.Generator) -> dict[str, Any]:
    """Two tokens of text, the slots of a reference picture of 4x4 tokens, and text that is padded; then the picture."""
    slots = torch.tensor([False, False, True, True, True, True, False, False, False, False] + area(12) * [True])
    valid = torch.ones(batch, 10, dtype=torch.bool)
    valid[1, -2:] = False
    return {
        "hidden_states": normal(batch, 16 + area(48), 4, rng=rng),
        "encoder_hidden_states": normal(batch, 10, 32, rng=rng),
        "encoder_hidden_states_mask": valid,
        "img_shapes": [[(1, 4, 4), (1, *grid())]] * batch,
        "img_mask": slots.expand(batch, -1),
    }


def prx(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return latents(batch, rng) | {"attention_mask": text_mask(batch)}


def hunyuan(batch: int, rng: torch.Generator) -> dict[str, Any]:
    rotary: Any = get_2d_rotary_pos_embed(8, ((0, 0), grid()), grid(), output_type="pt")
    return latents(batch, rng) | {
        "encoder_hidden_states": normal(batch, TEXT, 32, rng=rng),
        "text_embedding_mask": text_mask(batch)[:, -TEXT:],
        "encoder_hidden_states_t5": normal(batch, 4, 32, rng=rng),
        "text_embedding_mask_t5": torch.ones(batch, 4, dtype=torch.bool),
        "image_rotary_emb": rotary,
    }


def hunyuan_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return hunyuan(batch, rng) | condition(batch, rng)


def blocks_of(out: Any) -> Tensor:
    """What a ControlNet returns for every block."""
    return torch.cat([block for blocks in out if blocks is not None for block in blocks], dim=-1)


def joined(out: Any) -> Tensor:
    """The same, of ControlNets that return it as it is."""
    return torch.cat(list(out), dim=-1)


def hunyuan_scheduler() -> Any:
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


SD3 = {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64,
    "out_channels": 4, "pos_embed_max_size": 32,
}  # fmt: skip
LARGE_SD3 = {"pos_embed_max_size": 64}
TOKENS = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
FLUX = TOKENS | {"pooled_projection_dim": 32}
FIBO2 = {
    "in_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
    "cap_feat_dim": 16, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2,
    "max_num_gist_tokens": 6, "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 12, "axes_dims": (4, 4, 8),
    "axes_lens": (32, 16, 16),
}  # fmt: skip
LARGE_FIBO2 = {"axes_lens": (64, 64, 64)}
FLUX2 = TOKENS | {
    "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "mlp_ratio": 2.0,
}  # fmt: skip
FLUX3 = {
    "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
QWEN = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
HUNYUAN = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 16,
    "hidden_size": 32, "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16,
    "text_len": TEXT, "text_len_t5": 4, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip


QWEN21 = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "context_in_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def case(name: str, config: Any, inputs: Any, num_layers: int, **more: Any) -> Case:
    """With a picture of 8x6 tokens, and text."""
    more = {"grid": (8, 6), "time": lambda u: u, "context": TEXT} | more
    return Case(name, config, inputs, num_layers=num_layers, **more)


def up_to_1000(level: float) -> float:
    return 1000 * level


JOINT = (
    case("SD3Transformer2DModel", SD3, sd3, 2, time=up_to_1000, enlarged=LARGE_SD3),
    case(
        "SD3Transformer2DModel 3.5", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, sd3, 3,
        time=up_to_1000, enlarged=LARGE_SD3,
    ),
    case("SD3ControlNetModel", SD3, sd3_control, 2, time=up_to_1000, output=blocks_of, enlarged=LARGE_SD3),
    case(
        "SD3ControlNetModel 3.5 Large",
        SD3 | {"pos_embed_type": None, "joint_attention_dim": None, "use_pos_embed": False},
        sd35_large_control, 2, time=up_to_1000, context=0, output=blocks_of,
    ),
    case("FluxTransformer2DModel", FLUX, flux, 2),
    case("FluxTransformer2DModel Kontext", FLUX, kontext, 2, references=(REFERENCE,)),
    case("FluxControlNetModel", FLUX | {"num_mode": 3}, flux_control, 2, context=TEXT + 1, output=blocks_of),
    case(
        "ChromaTransformer2DModel",
        TOKENS | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}, chroma, 2,
    ),
    case("QwenImageTransformer2DModel", QWEN, qwen, 2),
    case("QwenImageTransformer2DModel edit", QWEN, qwen_edit, 2, references=(REFERENCE,)),
    case("QwenImageControlNetModel", QWEN, qwen_control, 2, output=joined),
    case(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
            "out_channels": 4, "pos_embed_max_size": 256,
        },
        latents, 2, context=TEXT + 8, enlarged={"pos_embed_max_size": 4096},
    ),
    case(
        "HunyuanDiT2DModel", HUNYUAN | {"num_layers": 2}, hunyuan, 2, time=up_to_1000, context=0,
        scheduler=hunyuan_scheduler,
    ),
    case(
        "HunyuanDiT2DControlNetModel", HUNYUAN | {"transformer_num_layers": 4}, hunyuan_control, 1, time=up_to_1000,
        context=0, scheduler=hunyuan_scheduler, output=lambda out: joined(out[0]),
    ),
    case("BriaTransformer2DModel", TOKENS, tokens, 2, time=up_to_1000),
    case(
        "BriaFiboTransformer2DModel", TOKENS | {"text_encoder_dim": 16}, fibo, 2, time=up_to_1000,
        batched_lists=frozenset({"text_encoder_layers"}),
    ),
    case("BriaFibo2Transformer2DModel", FIBO2, fibo2, 3, enlarged=LARGE_FIBO2),
    case(
        "BriaFibo2Transformer2DModel edit", FIBO2, fibo2_edit, 3, references=(REFERENCE,),
        batched_lists=frozenset({"context_latents"}), enlarged=LARGE_FIBO2,
    ),
    case("OvisImageTransformer2DModel", TOKENS | {"out_channels": 4}, tokens, 2),
    case("LongCatImageTransformer2DModel", TOKENS, tokens, 2),
    case("Flux2Transformer2DModel", FLUX2, flux2, 2, references=(REFERENCE,)),
    case("Flux3Transformer2DModel", FLUX3, flux3, 2),
    case("Flux3Transformer2DModel edit", FLUX3, flux3_edit, 2, references=(REFERENCE,)),
    case("QwenImage21Transformer2DModel", QWEN21, qwen21, 2, context=6 + 16),
    case(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 2,
            "axes_dim": [8, 8],
        },
        prx, 2,
    ),
)  # fmt: skip
