"""MMDiT and text encoder, trained together: flow matching (arXiv 2403.03206), velocity = noise - picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from emoji_sd.precision import autocast
from torch import Tensor, nn
from training_loop import batch_indices
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .joint_keys import FewerKeys
from .presets import Stage

DROPPED = 0.1
"""Share of the prompts that are trained as empty ones, for guidance."""


def build_transformer(width: int, layers: int, heads: int, text_width: int, side: int) -> SD3Transformer2DModel:
    """One token per latent pixel. Modulations and the last layer begin at zero, as in DiT (arXiv 2212.09748, 3.2)."""
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    for name, parameter in model.named_parameters():
        if name.endswith((".linear.weight", ".linear.bias")) or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model


def build_text_encoder(start: CLIPTextModel) -> CLIPTextModelWithProjection:
    """`start` with a projection, which begins as the identity."""
    model = CLIPTextModelWithProjection(start.config)
    model.text_model.load_state_dict(start.state_dict())
    nn.init.eye_(model.text_projection.weight)
    return model


@torch.no_grad()
def set_positions(transformer: SD3Transformer2DModel, side: int) -> None:
    """Positions of `side`×`side` tokens that cover the whole picture: each token lies at the middle of its pixels."""
    full = transformer.config["sample_size"]
    step = full // side
    at = torch.arange(side, dtype=torch.float32) * step + (step - 1) / 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy")).reshape(2, 1, side, side)
    embed: Any = transformer.pos_embed
    found: Any = get_2d_sincos_pos_embed_from_grid(embed.pos_embed.shape[-1], grid, output_type="pt")
    embed.pos_embed = found.float()[None].to(embed.pos_embed.device)
    embed.pos_embed_max_size = side


class Denoiser(nn.Module):
    """One text encoder takes both places that StableDiffusion3Pipeline has for CLIP; T5's tokens are zeros."""

    def __init__(self, transformer: SD3Transformer2DModel, text: CLIPTextModelWithProjection):
        super().__init__()
        self.transformer, self.text = transformer, text

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x [B, 4, h, w], t [B] in 0..1000, ids [B, 32] → predicted velocity [B, 4, h, w]."""
        found = self.text(ids, output_hidden_states=True)
        words, pooled = found.hidden_states[-2], found.text_embeds
        context = F.pad(torch.cat([words, words], dim=-1), (0, 0, 0, 1))  # one token for T5's: see `joint_keys`
        return self.transformer(x, context, torch.cat([pooled, pooled], dim=-1), t).sample


def denoiser_loss(
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    stage: Stage,
    processors: list[FewerKeys],
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """latents [N, 4, h, w] scaled, ids [N, 32], empty [32]: the prompt that replaces a share `DROPPED`."""
    batch = stage.batch

    def loss_of(model: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        for processor in processors:
            processor.draw_corner(rng)
        index = batch_indices(step, batch, len(latents), seed)
        x0, prompt = latents[index], ids[index]
        prompt = torch.where(torch.rand(batch, 1, generator=rng) < DROPPED, empty, prompt)
        noise = torch.randn(x0.shape, generator=rng)
        sigma = (torch.randn(batch, generator=rng) + stage.logit_mean).sigmoid()
        share = sigma[:, None, None, None]
        x = (1 - share) * x0 + share * noise
        with autocast(device, dtype):
            v = model(x.to(device), 1000 * sigma.to(device), prompt.to(device))
        return F.mse_loss(v.float(), (noise - x0).to(device))

    return loss_of
