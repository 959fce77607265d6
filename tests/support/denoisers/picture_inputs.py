"""What the pipelines of tiny transformers of pictures give them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from support.denoisers.case import area, normal, side

TEXT = 6
ROWS, COLUMNS = 8, 6
GRID = (ROWS, COLUMNS)


def rows() -> int:
    return side(ROWS)


def columns() -> int:
    return side(COLUMNS)


def words() -> int:
    """Tokens of the text."""
    return area(TEXT)


def latents(batch: int, rng: torch.Generator) -> Tensor:
    """Of `GRID` patches of 2x2."""
    return normal(batch, 4, 2 * rows(), 2 * columns(), rng=rng)


def places(first: int = 0) -> Tensor:
    """(0, row, column) of every token, after `first` tokens at the origin."""
    ids = torch.zeros(rows(), columns(), 3)
    ids[..., 1] += torch.arange(rows())[:, None]
    ids[..., 2] += torch.arange(columns())[None]
    return torch.cat((torch.zeros(first, 3), ids.flatten(0, 1)))


def lengths(batch: int, shorter: int = 0) -> Tensor:
    """A mask [B, TEXT] of texts of which every second is shorter."""
    mask = torch.ones(batch, words(), dtype=torch.long)
    mask[1::2, words() - shorter :] = 0
    return mask


def lumina2(batch: int, rng: torch.Generator, shorter: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, rng),
        "encoder_hidden_states": normal(batch, words(), 32, rng=rng),
        "encoder_attention_mask": lengths(batch, shorter),
    }


def z_image(batch: int, rng: torch.Generator, shorter: int = 0) -> dict[str, Any]:
    """168 tokens of the picture and the text are padded to multiples of 32."""
    texts = [normal(area(40) - (shorter if i % 2 else 0), 16, rng=rng) for i in range(batch)]
    return {"x": list(normal(batch, 4, 1, side(28), side(24), rng=rng)), "cap_feats": texts}


def z_image_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return z_image(batch, rng) | {"control_context": list(normal(batch, 4, 1, side(28), side(24), rng=rng))}


def sizes(batch: int) -> dict[str, Any]:
    return {
        "original_size": torch.full((batch, 2), 32.0),
        "target_size": torch.full((batch, 2), 32.0),
        "crop_coords": torch.zeros(batch, 2),
    }


def cogview(batch: int, rng: torch.Generator) -> dict[str, Any]:
    text = normal(batch, words(), 16, rng=rng)
    return {"hidden_states": latents(batch, rng), "encoder_hidden_states": text} | sizes(batch)


def cogview4_masked(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return cogview(batch, rng) | {"attention_mask": lengths(batch, 2)}


def hidream(batch: int, rng: torch.Generator, square: bool = True) -> dict[str, Any]:
    size = (2 * rows(), 2 * rows()) if square else (2 * rows(), 2 * columns())
    return {
        "hidden_states": normal(batch, 4, *size, rng=rng),
        "encoder_hidden_states_t5": normal(batch, 4, 16, rng=rng),
        "encoder_hidden_states_llama3": normal(3, batch, 3, 12, rng=rng),
        "pooled_embeds": normal(batch, 16, rng=rng),
    }


def hunyuan(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, rows(), columns(), rng=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_attention_mask": lengths(batch, 2),
        "encoder_hidden_states_2": normal(batch, 3, 12, rng=rng),
        "encoder_attention_mask_2": torch.ones(batch, 3, dtype=torch.long),
    }


def hunyuan_refiner(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 1, rows(), columns(), rng=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_attention_mask": lengths(batch),
    }


def lumina_next(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_mask": lengths(batch, 2),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, side(16), side(16)),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }


def krea2(batch: int, rng: torch.Generator, shorter: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, rows() * columns(), 4, rng=rng),
        "encoder_hidden_states": normal(batch, words(), 2, 16, rng=rng),
        "position_ids": places(words()),
        "encoder_attention_mask": lengths(batch, shorter).bool(),
    }


def ideogram4(batch: int, rng: torch.Generator, shorter: int = 0) -> dict[str, Any]:
    """Texts are padded on the left."""
    mask = lengths(batch, shorter).flip(1).bool()
    picture = torch.ones(batch, rows() * columns(), dtype=torch.long)
    return {
        "hidden_states": torch.cat(
            (torch.zeros(batch, words(), 4), normal(batch, rows() * columns(), 4, rng=rng)), dim=1
        ),
        "encoder_hidden_states": torch.cat(
            (normal(batch, words(), 16, rng=rng), torch.zeros(batch, rows() * columns(), 16)), dim=1
        ),
        "position_ids": places(words()).long().repeat(batch, 1, 1),
        "segment_ids": torch.cat((torch.where(mask, 1, -1), picture), dim=1),
        "indicator": torch.cat((torch.where(mask, 3, 0), 2 * picture), dim=1),
    }


def ernie(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, rows(), columns(), rng=rng),
        "text_bth": normal(batch, words(), 16, rng=rng),
        "text_lens": lengths(batch, 2).sum(dim=1),
    }


def glm(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = cogview(batch, rng)
    del given["original_size"]
    return given | {
        "prior_token_id": torch.randint(16, (batch, rows() * columns()), generator=rng),
        "prior_token_drop": torch.zeros(batch, rows() * columns(), dtype=torch.bool),
    }


def omnigen(batch: int, rng: torch.Generator, shorter: int = 0) -> dict[str, Any]:
    """Words attend to those before them, and padding on the left is not seen. All texts have the same length, since
    diffusers gives all samples the places of the first."""
    total = words() + 1 + rows() * columns()
    mask = torch.ones(batch, total, total).tril()
    mask[:, words() + 1 :] = 1
    ids = torch.arange(total).repeat(batch, 1)
    if shorter:
        mask[:, :, :shorter] = 0
        mask[:, :shorter] = 1
        ids = (ids - shorter).clamp(min=0)
    return {
        "hidden_states": latents(batch, rng),
        "input_ids": torch.randint(1, 20, (batch, words()), generator=rng),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": ids,
    }


def joy(batch: int, rng: torch.Generator, items: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, items, 4, 1, 2 * rows(), 2 * columns(), rng=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
    }


def joy_plus(batch: int, rng: torch.Generator, padding: int = 0) -> dict[str, Any]:
    patches = rows() * columns() + 20 + padding  # of a picture, and of another one
    return {
        "hidden_states": normal(batch, patches, 4, 1, 2, 2, rng=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_hidden_states_mask": lengths(batch, 2).float(),
        "shape_list": [[(1, rows(), columns()), (1, 4, 5)]] * batch,
    }


def nucleus(batch: int, rng: torch.Generator, masked: bool = False) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, rows() * columns(), 4, rng=rng),
        "img_shapes": [(1, rows(), columns())] * batch,
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_hidden_states_mask": lengths(batch, 2).bool() if masked else None,
    }


def uvit(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(20, (batch, side(32), side(32)), generator=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "pooled_text_emb": normal(batch, 16, rng=rng),
        "micro_conds": torch.ones(batch, 5),
    }


def plain(batch: int, rng: torch.Generator) -> dict[str, Any]:
    square = normal(batch, 4, 2 * rows(), 2 * rows(), rng=rng)
    return {"hidden_states": square, "class_labels": torch.zeros(batch, dtype=torch.long)}


def plain_latents(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": normal(batch, 4, rows(), columns(), rng=rng)}


def plain_with_text(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return plain_latents(batch, rng) | {"encoder_hidden_states": normal(batch, words(), 16, rng=rng)}


def plain_tokens(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": torch.randint(20, (batch, rows() * rows()), generator=rng)}


def unidiffuser(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "latent_image_embeds": normal(batch, 4, 2 * rows(), 2 * rows(), rng=rng),
        "image_embeds": normal(batch, 1, 16, rng=rng),
        "prompt_embeds": normal(batch, words(), 16, rng=rng),
        "timestep_text": 0,
    }


def dream_lite(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "sample": normal(batch, 4, rows(), 2 * columns(), rng=rng),  # beside the picture, the one to be edited
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "added_cond_kwargs": {"time_ids": torch.ones(1, 6)},
    }
