"""How often a drawn picture is nearest to the one it was asked for, how close it is, and grids to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from diffattn.metrics.paired import foreground_psnr, mean_of_known, psnr

from .data import Pictures, held_out_of_vae, shrink, to_float
from .vae import decode, encode

Figures = dict[str, Any]  # of JSON types


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """uint8 [Q, 3, S, S], [G, 3, S, S] → index of the nearest gallery picture, L2 over pixels at 64×64. [Q]"""
    q, g = (torch.cat([shrink(to_float(x), 64).flatten(1) for x in xs.split(64)]) for xs in (queries, gallery))
    return torch.cdist(q, g).argmin(dim=1)


def hit_rate(found: Tensor, wanted: list[int]) -> float:
    """Percentage of queries whose nearest picture is the wanted one."""
    return round(100 * (found == torch.tensor(wanted)).float().mean().item(), 1)


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline | StableDiffusion3Pipeline,
    prompts: list[str],
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 16,
) -> Tensor:
    """One picture per prompt, each from its own generator with the same seed. → uint8 [N, 3, S, S]"""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        rngs = [torch.Generator().manual_seed(seed) for _ in part]
        drawn: Any = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=rngs, output_type="pt")
        parts.append((drawn.images.cpu().float() * 255).round().to(torch.uint8))
    return torch.cat(parts)


def closeness(drawn: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S, S] both → PSNR of every pair in dB, the same over what is not white in the real one. [N], [N]"""
    pairs = [(a / 255, b / 255) for a, b in zip(drawn.split(64), real.split(64), strict=True)]
    return torch.cat([psnr(a, b) for a, b in pairs]), torch.cat([foreground_psnr(a, b) for a, b in pairs])


def vae_figures(vae: AutoencoderKL, pictures: Pictures, count: int, every: int | None, device: str) -> Figures:
    """Reconstructions of `count` pictures spread over all, and of all those the autoencoder was not trained on."""
    spread = list(range(0, len(pictures), max(len(pictures) // count, 1)))
    again = _reconstruct(vae, pictures.images[spread], device)
    whole, inside = closeness(again, pictures.images[spread])
    found: Figures = {
        "vae_pictures": len(spread),
        "vae_nearest_percent": hit_rate(nearest(again, pictures.images), spread),
        "vae_psnr_db": _mean(whole),
        "vae_foreground_psnr_db": _mean(inside),
    }
    _, held_out = held_out_of_vae(len(pictures), every)
    if held_out:
        real = pictures.images[held_out]
        whole, inside = closeness(_reconstruct(vae, real, device), real)
        found |= {
            "vae_held_out_pictures": len(held_out),
            "vae_held_out_psnr_db": _mean(whole),
            "vae_held_out_foreground_psnr_db": _mean(inside),
        }
    return found


def _reconstruct(vae: AutoencoderKL, images: Tensor, device: str) -> Tensor:
    return decode(vae, encode(vae, images, images.shape[-1], device)[0], device)


def name_figures(drawn: Tensor, pictures: Pictures, trained: list[int]) -> Figures:
    """`drawn[i]` was asked for by the name of picture `trained[i]`."""
    real = pictures.images[trained]
    whole, inside = closeness(drawn, real)
    return {
        "trained_names": len(trained),
        "nearest_among_trained_percent": hit_rate(nearest(drawn, real), list(range(len(trained)))),
        "nearest_among_all_percent": hit_rate(nearest(drawn, pictures.images), trained),
        "psnr_to_real_db_median": round(whole.median().item(), 2),
        "foreground_psnr_to_real_db_median": round(inside.nanmedian().item(), 2),
    }


def best_guidance(rows: list[Figures]) -> float:
    """Of a sweep: most often nearest to the prompted picture among those trained on; of equals the closest to it."""
    best = max(rows, key=lambda row: (row["nearest_among_trained_percent"], row["psnr_to_real_db_median"]))
    return best["guidance"]


def _mean(values: Tensor) -> float | None:
    mean = mean_of_known(values)
    return None if mean is None else round(mean, 2)


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
