"""How often a drawn picture is nearest to the one it was asked for, and grids to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from .data import Pictures, shrink, to_float
from .vae import decode, encode

Figure = float | int | str


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """uint8 [Q, 3, S, S], [G, 3, S, S] → index of the nearest gallery picture, L2 over pixels at 64×64. [Q]"""
    q, g = (shrink(to_float(x), 64).flatten(1) for x in (queries, gallery))
    return torch.cdist(q, g).argmin(dim=1)


def hit_rate(found: Tensor, wanted: list[int]) -> float:
    """Percentage of queries whose nearest picture is the wanted one."""
    return round(100 * (found == torch.tensor(wanted)).float().mean().item(), 1)


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int, batch: int = 16
) -> Tensor:
    """One picture per prompt, each from its own generator with the same seed. → uint8 [N, 3, S, S]"""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        rngs = [torch.Generator().manual_seed(seed) for _ in part]
        pictures = pipe(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=rngs, output_type="pt"
        ).images
        parts.append((pictures.cpu() * 255).round().to(torch.uint8))
    return torch.cat(parts)


def vae_figures(vae: AutoencoderKL, pictures: Pictures, count: int, device: str) -> dict[str, Figure]:
    """Reconstructions of `count` pictures spread over all: hit rate among all, PSNR."""
    index = list(range(0, len(pictures), max(len(pictures) // count, 1)))
    images = pictures.images[index]
    latents, _ = encode(vae, images, images.shape[-1], device)
    again = decode(vae, latents, device)
    mse = (to_float(again) - to_float(images)).square().flatten(1).mean(1) / 4  # of the 0..1 scale
    return {
        "vae_pictures": len(index),
        "vae_nearest_percent": hit_rate(nearest(again, pictures.images), index),
        "vae_psnr_db": round((-10 * mse.log10()).mean().item(), 2),
    }


def name_figures(drawn: Tensor, pictures: Pictures, trained: list[int]) -> dict[str, Figure]:
    """`drawn[i]` was asked for by the name of picture `trained[i]`."""
    among_trained = nearest(drawn, pictures.images[trained])
    return {
        "trained_names": len(trained),
        "nearest_among_trained_percent": hit_rate(among_trained, list(range(len(trained)))),
        "nearest_among_all_percent": hit_rate(nearest(drawn, pictures.images), trained),
    }


def grid(real: Tensor, drawn: Tensor, names: list[str], path: Path, columns: int = 8, cell: int = 128) -> None:
    """Pairs of real (top) and drawn picture, captioned, `columns` a row."""
    rows = -(-len(names) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (2 * cell + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        left, top = (i % columns) * (cell + 8), (i // columns) * (2 * cell + 28)
        for j, picture in enumerate((real[i], drawn[i])):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + 4, top + j * cell))
        pen.text((left + 6, top + 2 * cell + 4), name[:22], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
