"""UNet and text encoder, trained together from scratch: v-prediction under a noise schedule that ends in pure noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from training_loop import batch_indices
from transformers import CLIPTextModel

from .precision import autocast
from .presets import Stage
from .strided_keys import strided


def build_scheduler() -> DDIMScheduler:
    """Zero terminal SNR (arXiv 2305.08891): white backgrounds need the first step to start from pure noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True,
        timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False, steps_offset=1,
    )  # fmt: skip


def build_unet(channels: tuple[int, ...], heads: tuple[int, ...], text_width: int, size: int) -> UNet2DConditionModel:
    """Attention at every level but the deepest, and in the middle block. `heads`: attention heads of each level."""
    above = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * above + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * above,
        attention_head_dim=heads,  # type: ignore[arg-type]  # diffusers' name; it is the number of heads
        cross_attention_dim=text_width,
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x [B, 4, h, w], t [B], ids [B, 32] → predicted velocity [B, 4, h, w]."""
        return self.unet(x, t, encoder_hidden_states=self.text(ids).last_hidden_state).sample


def sample_timesteps(batch: int, total: int, rng: torch.Generator, towards_noise: float) -> Tensor:
    """t = T·(1 - (1-u)^a): denser near T, where it is decided which picture appears, for a > 1. → [B] int64"""
    u = torch.rand(batch, generator=rng)
    return ((1 - (1 - u) ** towards_noise) * total).long().clamp(max=total - 1)


def denoiser_loss(
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    stage: Stage,
    seed: int,
    device: str,
    dtype: torch.dtype,
    drop: float = 0.1,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """latents [N, 4, h, w] scaled, ids [N, 32], empty [32]: the prompt that replaces a share `drop` for guidance."""
    scheduler = build_scheduler()
    batch = stage.batch

    def loss_of(model: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        for processor in strided(model):
            processor.draw_corner(rng)
        index = batch_indices(step, batch, len(latents), seed)
        x0, prompt = latents[index], ids[index]
        prompt = torch.where(torch.rand(batch, 1, generator=rng) < drop, empty, prompt)
        noise = torch.randn(x0.shape, generator=rng)
        t = sample_timesteps(batch, scheduler.config["num_train_timesteps"], rng, stage.towards_noise)
        x = scheduler.add_noise(x0, noise, t)  # type: ignore[arg-type]
        x = x.to(device).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(x0, noise, t).to(device)  # type: ignore[arg-type]
        with autocast(device, dtype):
            v = model(x, t.to(device), prompt.to(device))
        return F.mse_loss(v.float(), target)

    return loss_of
