"""Arguments of tiny transformers of videos, as their pipelines give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.denoisers.case import Inputs, area, normal, side

TEXT = 6


def words() -> int:
    """Tokens of the text."""
    return area(TEXT)


def grid() -> tuple[int, int, int]:
    """Of the video's tokens."""
    return 3, side(4), side(6)


def latents(channels: int, frames: int = 3, height: int = 8, width: int = 12, text: int = 16) -> Inputs:
    """Latents [B, C, f, h, w] and a text [B, 6, text]."""

    def inputs(batch: int, rng: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": normal(batch, channels, frames, side(height), side(width), rng=rng),
            "encoder_hidden_states": normal(batch, words(), text, rng=rng),
        }

    return inputs


def wan_with_image(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(8)(batch, rng),
        "encoder_hidden_states": normal(batch, 512, 16, rng=rng),
        "encoder_hidden_states_image": normal(batch, 5, 20, rng=rng),
    }


def vace(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**latents(4)(batch, rng), "control_hidden_states": normal(batch, 12, 3, side(8), side(12), rng=rng)}


def animate(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(12, frames=5)(batch, rng),
        "encoder_hidden_states_image": normal(batch, 5, 16, rng=rng),
        "pose_hidden_states": normal(batch, 4, 4, side(8), side(12), rng=rng),
        "face_pixel_values": normal(batch, 3, 13, 16, 16, rng=rng),
    }


def cogvideox(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = latents(4)(batch, rng)
    return given | {"hidden_states": given["hidden_states"].transpose(1, 2).contiguous()}


def consisid(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **cogvideox(batch, rng),
        "id_vit_hidden": [normal(batch, 2, 2, rng=rng)],
        "id_cond": normal(batch, 2, rng=rng),
    }


def padded(batch: int, tokens: int | None = None) -> Tensor:
    """A mask [B, tokens] over text of different lengths."""
    tokens = words() if tokens is None else tokens
    lengths = tokens - 2 * torch.arange(batch)[:, None] % tokens
    return torch.arange(tokens)[None] < lengths


def hunyuan(channels: int, *size: int) -> Inputs:
    def inputs(batch: int, rng: torch.Generator) -> dict[str, Any]:
        return {
            **latents(channels, *size)(batch, rng),
            "encoder_attention_mask": padded(batch).float(),
            "pooled_projections": normal(batch, 8, rng=rng),
            "guidance": torch.full((batch,), 6000.0),
        }

    return inputs


def hunyuan_15(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(4, 3, 4, 6)(batch, rng),
        "encoder_attention_mask": padded(batch).float(),
        "encoder_hidden_states_2": normal(batch, 4, 16, rng=rng),
        "encoder_attention_mask_2": padded(batch, 4).float(),
        "image_embeds": torch.zeros(batch, 3, 16),
    }


def framepack(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **hunyuan(4)(batch, rng),
        "image_embeds": normal(batch, 3, 16, rng=rng),
        "indices_latents": torch.arange(8.0, 11),
        "latents_clean": normal(batch, 4, 1, side(8), side(12), rng=rng),
        "indices_latents_clean": torch.zeros(1),
        "latents_history_2x": normal(batch, 4, 3, side(8), side(12), rng=rng),
        "indices_latents_history_2x": torch.arange(5.0, 8),
        "latents_history_4x": normal(batch, 4, 4, side(8), side(12), rng=rng),
        "indices_latents_history_4x": torch.arange(1.0, 5),
    }


def mochi(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**latents(4)(batch, rng), "encoder_attention_mask": padded(batch)}


def kandinsky5(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = latents(4)(batch, rng)
    return {
        "hidden_states": given["hidden_states"].movedim(1, -1).contiguous(),
        "encoder_hidden_states": given["encoder_hidden_states"],
        "pooled_projections": normal(batch, 16, rng=rng),
        "visual_rope_pos": [torch.arange(n) for n in grid()],
        "text_rope_pos": torch.arange(words()),
    }


def kandinsky6(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = latents(9)(batch, rng)
    return {
        "hidden_states": given["hidden_states"].movedim(1, -1).contiguous(),
        "encoder_hidden_states": given["encoder_hidden_states"],
        "pooled_projections": normal(batch, 16, rng=rng),
        "audio_hidden_states": normal(batch, 7, 4, rng=rng),
        "encoder_attention_mask": padded(batch),
    }


def anyflow(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**cogvideox(batch, rng), "r_timestep": torch.full((batch, 3), 250.0)}


def helios(batch: int, rng: torch.Generator) -> dict[str, Any]:
    history = {"long": 4, "mid": 3, "short": 1}
    return {
        **latents(4)(batch, rng),
        "indices_hidden_states": torch.arange(8.0, 11).expand(batch, 3),
        **{f"latents_history_{name}": normal(batch, 4, n, side(8), side(12), rng=rng) for name, n in history.items()},
        **{f"indices_latents_history_{name}": torch.arange(1.0, n + 1).expand(batch, n) for name, n in history.items()},
    }


def motif(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **latents(9)(batch, rng),
        "encoder_attention_mask": padded(batch),
        "image_embeds": normal(batch, 3, 4, rng=rng),
    }


def ltx(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, area(72), 4, rng=rng),
        "encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "encoder_attention_mask": padded(batch),
        "num_frames": 3,
        "height": side(4),
        "width": side(6),
    }


def ltx_with_coordinates(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = ltx(batch, rng)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid()), indexing="ij")
    sizes = {"num_frames": None, "height": None, "width": None}
    return given | sizes | {"video_coords": torch.stack(axes).flatten(1).expand(batch, 3, area(72))}


def ltx2(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        **ltx(batch, rng),
        "audio_hidden_states": normal(batch, 9, 4, rng=rng),
        "audio_encoder_hidden_states": normal(batch, words(), 16, rng=rng),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def cosmos(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {**latents(4)(batch, rng), "fps": 30}


def cosmos_control(batch: int, rng: torch.Generator) -> dict[str, Any]:
    given = cosmos(batch, rng)
    return {
        "latents": given.pop("hidden_states"),
        "controls_latents": normal(batch, 4, 3, side(8), side(12), rng=rng),
        "condition_mask": torch.ones(batch, 1, 3, side(8), side(12)),
        "padding_mask": torch.zeros(1, 1, side(8), side(12)),
        **given,
    }


def cosmos3(batch: int, rng: torch.Generator) -> dict[str, Any]:
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid()), indexing="ij")).flatten(1)
    return {
        "input_ids": torch.arange(words()) % 32,
        "text_indexes": torch.arange(words()),
        "position_ids": torch.cat((torch.arange(words()).expand(3, words()), places + words()), dim=1),
        "und_len": words(),
        "sequence_length": words() + area(72),
        "vision_tokens": [normal(1, 4, 3, side(8), side(12), rng=rng)],
        "vision_token_shapes": [grid()],
        "vision_sequence_indexes": words() + torch.arange(area(72)),
        "vision_mse_loss_indexes": words() + torch.arange(area(72)),
        "vision_noisy_frame_indexes": [torch.arange(3)],
    }


def sana_wm(batch: int, rng: torch.Generator) -> dict[str, Any]:
    pose = torch.eye(4).flatten().repeat(batch, 3, 1)
    pose[..., 3] += torch.arange(3.0) / 8
    lens = torch.tensor([8.0, 8.0, 3.0, 2.0]).repeat(batch, 3, 1)
    return {
        "hidden_states": normal(batch, 4, *grid(), rng=rng),
        "encoder_hidden_states": normal(batch, 1, words(), 16, rng=rng),
        "encoder_attention_mask": torch.ones(batch, words()),
        "camera_conditions": torch.cat((pose, lens), dim=-1),
    }


def minimax(batch: int, rng: torch.Generator) -> dict[str, Any]:
    text, condition, audio, video = 6, 24, 8, area(72)
    total = text + condition + audio + video
    places = torch.zeros(total, 3)
    places[:, 0] = torch.arange(total)
    axes = torch.stack(torch.meshgrid(*map(torch.arange, grid()), indexing="ij"))
    places[-video:] = axes.flatten(1).T + torch.tensor([float(text), 0, 0])
    starts = text + condition + audio
    rows = torch.arange(total)
    tags = torch.tensor([1] * text + [0] * condition + [2] * audio + [0] * video)
    return {
        "hidden_states": normal(batch, condition + video, 16, rng=rng),
        "audio_hidden_states": normal(batch, audio, 6, rng=rng),
        "encoder_hidden_states": normal(batch, text, 8, rng=rng),
        "timestep_indices": torch.where(tags == 2, 2, torch.where(rows < starts, 1, 0)),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": rows[tags == 0],
        "audio_indices": rows[tags == 2],
        "text_indices": rows[tags == 1],
    }
