"""Tiny transformers of videos."""

from __future__ import annotations

from typing import Any

import torch

from support.denoisers.case import Case, normal


def wan(batch: int, rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, 3, 8, 12, rng=rng),
        "encoder_hidden_states": normal(batch, 6, 16, rng=rng),
    }


VIDEOS = (
    Case(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
        },
        wan, grid=(3, 4, 6), time=lambda u: 1000 * u, num_layers=2,
    ),
)  # fmt: skip
