"""Tiny transformers of pictures and text together."""

from __future__ import annotations

from typing import Any

import torch

from support.denoisers.case import Case, normal

TEXT = 6


def sd3(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 16, 12, rng=rng),
        "encoder_hidden_states": normal(batch, TEXT, 32, rng=rng),
        "pooled_projections": normal(batch, 64, rng=rng),
    }


def flux(batch: int, rng: torch.Generator) -> dict[str, Any]:
    rows, columns = 8, 6
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return {
        "hidden_states": normal(batch, rows * columns, 4, rng=rng),
        "encoder_hidden_states": normal(batch, TEXT, 32, rng=rng),
        "pooled_projections": normal(batch, 32, rng=rng),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


SD3 = {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64,
    "out_channels": 4, "pos_embed_max_size": 32,
}  # fmt: skip

JOINT = (
    Case("SD3Transformer2DModel", SD3, sd3, grid=(8, 6), time=lambda u: 1000 * u, num_layers=2, context=TEXT),
    Case(
        "SD3Transformer2DModel 3.5",
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        sd3, grid=(8, 6), time=lambda u: 1000 * u, num_layers=3, context=TEXT,
    ),
    Case(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        flux, grid=(8, 6), time=lambda u: u, num_layers=2, context=TEXT,
    ),
)  # fmt: skip
