"""What a picture may look like without changing its class. uint8 [B, 3, S, S] → float -1..1 [B, 3, s, s]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from emoji_sd.data import to_float
from torch import Tensor
from training_loop import batch_indices

from .data import Labelled

Batch = tuple[Tensor, Tensor]  # pictures, labels
BatchOf = Callable[[int, torch.Generator], Batch]  # step, its random numbers → its batch


def photo_batches(data: Labelled, batch: int, seed: int, shift: int = 2) -> BatchOf:
    """Shifted by up to `shift` pixels, and mirrored: each picture in turns, starting either way (arXiv 2404.00498)."""
    size, count = data.images.shape[-1], len(data)
    inside = F.pad(torch.arange(size)[None, None].float(), (shift, shift), mode="reflect")[0, 0].long()
    padded = data.images[:, :, inside][:, :, :, inside]
    crops = padded.unfold(2, size, 1).unfold(3, size, 1)  # [N, 3, 2·shift+1, 2·shift+1, S, S], a view
    first = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))

    def batch_of(step: int, rng: torch.Generator) -> Batch:
        index = batch_indices(step, batch, count, seed)
        row, column = torch.randint(2 * shift + 1, (2, batch), generator=rng)
        epoch = torch.arange(step * batch, (step + 1) * batch) // count
        x = to_float(crops[index, :, row, column])
        mirrored = (first[index] + epoch) % 2 == 1
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x), data.labels[index]

    return batch_of


def drawing_batches(data: Labelled, batch: int, seed: int, size: int) -> BatchOf:
    """Drawings on white: turned, scaled, moved, mirrored, their colours changed while white stays white."""
    ink = 255 - data.images  # 0 is white, so what is sampled from outside is white too

    def batch_of(step: int, rng: torch.Generator) -> Batch:
        index = batch_indices(step, batch, len(data), seed)
        grid = F.affine_grid(_affine(batch, rng), [batch, 3, size, size], align_corners=False)
        x = F.grid_sample(ink[index].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        mixed = _colours(batch, rng) @ x.flatten(2)
        return (1 - mixed.mul_(2 / 255).clamp_(0, 2)).unflatten(2, (size, size)), data.labels[index]

    return batch_of


def _affine(batch: int, rng: torch.Generator) -> Tensor:
    """The origin of the result's pixels: turned by ±20°, scaled by 1/1.25 to 1.25, moved by ±12 %. [B, 2, 3]"""
    angle, scale, x, y, sign = 2 * torch.rand(5, batch, generator=rng) - 1
    angle, scale = angle * math.radians(20), 1.25**scale
    mirror = torch.where(sign < 0, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack((cos * mirror, -sin, 0.24 * x), -1), torch.stack((sin * mirror, cos, 0.24 * y), -1)]
    return torch.stack(rows, dim=1)


def _colours(batch: int, rng: torch.Generator) -> Tensor:
    """Mixtures of ink colours: all ±15 %, each ±10 %, colour against grey ±25 %. [B, 3, 3]"""
    strength, colour, *channels = 2 * torch.rand(5, batch, 1, 1, generator=rng) - 1
    colour = 1 + 0.25 * colour
    mixture = colour * torch.eye(3) + (1 - colour) / 3
    return (1 + 0.15 * strength) * (1 + 0.1 * torch.cat(channels, dim=1)) * mixture
