"""The f=8 autoencoder: small, fully convolutional (so it trains on crops), L1 + edges + coarse scales + a tiny KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training_loop import batch_indices

from .data import Pictures, shrink, to_float
from .precision import autocast


def build_vae(channels: tuple[int, ...], layers: int, size: int) -> AutoencoderKL:
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
        block_out_channels=channels,  # type: ignore[arg-type]
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


class VaeTrainer(nn.Module):
    """The autoencoder and a linear readout of its latents, dropped after training: the readout hands
    the encoder a direct gradient for colour, which is the last thing reconstruction alone learns."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        self.readout = nn.Conv2d(vae.config["latent_channels"], 3, 1)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def chroma(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


def colour_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1, and the square for colour: most pixels are white or yellow, and L1 alone gives up the rare colours."""
    return (y - x).abs().mean() + 4 * (chroma(y) - chroma(x)).square().mean()


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 of pixels, of their differences, of 2×, 4×, 8× averages, and of colour apart from brightness."""
    loss = (y - x).abs().mean()
    for a, b in zip(edges(y), edges(x), strict=True):
        loss = loss + 0.5 * (a - b).abs().mean()
    for factor in (2, 4, 8):
        a, b = F.avg_pool2d(y, factor), F.avg_pool2d(x, factor)
        loss = loss + colour_loss(a, b)
    return loss


def vae_loss(
    pictures: Pictures,
    sizes: tuple[int, ...],
    pixels: int,
    seed: int,
    device: str,
    dtype: torch.dtype,
    kl_weight: float = 1e-4,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """Loss of one step of `pixels` pixels: crop sizes take turns, so group norms see details and whole pictures."""

    def loss_of(model: Any, step: int, rng: torch.Generator) -> Tensor:
        size = sizes[step % len(sizes)]
        batch = max(pixels // size**2, 1)
        images = pictures.images[batch_indices(step, batch, len(pictures), seed)]
        x = crop_batch(images, size, rng).to(device).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            posterior = model.vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
            z = posterior.mean + posterior.std * noise
            y = model.vae.decode(z).sample
        y, z = y.float(), z.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return reconstruction_loss(y, x) + colour_loss(model.readout(z), F.avg_pool2d(x, 8)) + kl_weight * kl

    return loss_of


def freeze_encoder(vae: AutoencoderKL) -> None:
    """Train only the decoder: latents stay unchanged, and so does everything that was trained on them."""
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        assert part is not None
        part.requires_grad_(True)


def decoder_loss(
    pictures: Pictures,
    latents: Tensor,
    sizes: tuple[int, ...],
    pixels: int,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """`latents` [N, 4, S/8, S/8] of the whole pictures, so that a crop's are what a decoder meets when it draws.

    `sizes` takes turns up to whole pictures: group norms average over what they are given.
    """

    def loss_of(vae: Any, step: int, rng: torch.Generator) -> Tensor:
        size = sizes[step % len(sizes)]
        index = batch_indices(step, max(pixels // size**2, 1), len(pictures), seed)
        z, x = crop_pairs(latents[index], pictures.images[index], size, rng)
        with autocast(device, dtype):
            y = vae.decode(z.to(device).contiguous(memory_format=torch.channels_last)).sample
        y, x = y.float(), x.to(device)
        return reconstruction_loss(y, x) + 0.3 * log_error(y, x)

    return loss_of


def log_error(y: Tensor, x: Tensor, floor: float = 1e-4) -> Tensor:
    """Mean logarithm of each picture's squared error: PSNR up to a factor, so plain pictures weigh like rich ones."""
    return ((y - x).square().flatten(1).mean(1) + floor).log().mean()


def crop_pairs(latents: Tensor, images: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, h, w] and uint8 pictures [B, 3, 8h, 8w] → the same random square of both, float."""
    side, pairs = size // 8, []
    for z, image in zip(latents, images, strict=True):
        top, left = torch.randint(z.shape[-1] - side + 1, (2,), generator=rng).tolist()
        crop = image[:, 8 * top : 8 * top + size, 8 * left : 8 * left + size]
        pairs.append((z[:, top : top + side, left : left + side], to_float(crop)))
    z, x = zip(*pairs, strict=True)
    return torch.stack(z), torch.stack(x)


def crop_batch(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """uint8 [B, 3, S, S] → float [B, 3, size, size]: by turns whole pictures, crops, whole, crops at half scale.

    Many whole pictures in one batch bring many colours: a steadier gradient for the rare ones.
    """
    out = []
    for i, image in enumerate(images):
        x = to_float(image)
        scale = (size, x.shape[-1], size, x.shape[-1] // 2)[i % 4]
        x = shrink(x[None], max(scale, size))[0]
        top, left = torch.randint(x.shape[-1] - size + 1, (2,), generator=rng).tolist()
        out.append(x[:, top : top + size, left : left + size])
    return torch.stack(out)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, size: int, device: str, batch: int = 16) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S, S] → posterior mean and std, both [N, 4, size/8, size/8], before scaling."""
    means, stds = [], []
    for part in images.split(batch):
        posterior = vae.encode(shrink(to_float(part.to(device)), size)).latent_dist  # type: ignore[union-attr]
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, device: str, batch: int = 16) -> Tensor:
    """Unscaled latents → uint8 [N, 3, 8h, 8w]."""
    parts = []
    for z in latents.split(batch):
        y = vae.decode(z.to(device)).sample.clamp(-1, 1)  # type: ignore[union-attr,arg-type]
        parts.append(((y + 1) * 127.5).round().to("cpu", torch.uint8))
    return torch.cat(parts)


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold z → (z - mean) / std, per channel [4], into the two 1×1 convolutions around the latents.

    Every latent channel then weighs the same in the denoiser's loss, and `scaling_factor` is 1.
    """
    mean, std = mean.to(vae.device), std.to(vae.device)
    moments: Any = vae.quant_conv  # 8 → 8 channels (mean, log variance)
    back: Any = vae.post_quant_conv  # 4 → 4
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    moments.weight.mul_(scale[:, None, None, None])
    moments.bias.mul_(scale).add_(shift)
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
