"""Cheap previews: an affine map from latents to colours, fitted once per model to its own VAE.

Shapes: B pictures, c latent channels, h, w of the latents.
"""

from typing import Any, Self

import torch
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

FIT_SIDE = 128  # pixels of the pictures the map is fitted to
FIT_PICTURES = 8
SIDE = 256  # pixels of the longer side of a preview


class Preview:
    """Maps clean latents [1, c, h, w] to a small picture.

    Args:
        weights: of the map, [c + 1, 3]; None where latents are pixels from -1 to 1.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        self.weights = weights

    @classmethod
    def of(cls, pipe: Any) -> Self | None:
        """The least-squares map over smooth random pictures encoded by the VAE; None if there is none.

        Some VAEs overflow in half precision: their latents are infinite or NaN. Others have no distribution of latents.
        """
        if getattr(pipe, "vae", None) is None:
            return cls()
        weights = fit(pipe)
        return None if weights is None else cls(weights)

    def __call__(self, latents: Tensor) -> Image.Image:
        x = latents[:1].detach().float().cpu()
        if self.weights is not None:
            pixels = torch.einsum("bchw,cd->bdhw", x, self.weights[:-1]) + self.weights[-1, :, None, None]
        else:
            pixels = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        colours = ((pixels[0] + 1) * 127.5).clamp(0, 255).nan_to_num(0).to(torch.uint8)
        picture = Image.fromarray(colours.permute(1, 2, 0).contiguous().numpy())
        scale = max(1, SIDE // max(picture.size))
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


@torch.no_grad()
def fit(pipe: Any) -> Tensor | None:
    """Weights [c + 1, 3] from scaled latents, and 1, to colours from -1 to 1; None as `Preview.of`."""
    vae = pipe.vae
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(FIT_PICTURES, 3, 4, 4, generator=generator) * 2 - 1
    pictures = interpolate(coarse, FIT_SIDE, mode="bicubic").clamp(-1, 1)
    encoded = vae.encode(pictures.to(vae.device, vae.dtype))
    if not hasattr(encoded, "latent_dist"):  # `AutoencoderTiny`
        return None
    latents = encoded.latent_dist.mean.float().cpu()
    latents = (latents - (vae.config.get("shift_factor") or 0)) * (vae.config.scaling_factor or 1)
    if not torch.isfinite(latents).all():
        return None
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [B·h·w, c]
    colours = adaptive_avg_pool2d(pictures, latents.shape[-2:]).permute(0, 2, 3, 1).flatten(0, 2)
    ones = torch.ones(len(rows), 1)
    return torch.linalg.lstsq(torch.cat([rows, ones], 1), colours).solution


def clean_estimate(pipe: Any, x: Tensor, t: Tensor, output: Tensor, guidance: float) -> Tensor:
    """The clean latents [1, c, h, w] that a denoiser's output implies.

    Args:
        pipe: for its scheduler.
        x: the denoiser's input [B, c, h, w]; if guidance doubles the batch, the second half is the conditional one,
            except for a `DiTPipeline`, where it is the first.
        t: its time, a scalar or [B].
        output: [B, >= c, h, w]
        guidance: scale of classifier-free guidance.
    """
    y = output[:, : x.shape[1]].float()
    if guidance > 1 and len(y) % 2 == 0:
        y = y.flip(0) if isinstance(pipe, DiTPipeline) else y
        y = y[:1] + guidance * (y[-1:] - y[:1])
    x, y, time = x[-1:].float(), y[-1:], t.flatten()[-1]
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas is None:  # a velocity model, t from 0 noise to 1 data
        return x + (1 - time.float()) * y
    a = alphas[int(time.clamp(0, len(alphas) - 1))].to(x)
    kind = getattr(pipe.scheduler.config, "prediction_type", "epsilon")
    if kind == "sample":
        return y
    if kind == "v_prediction":
        return a.sqrt() * x - (1 - a).sqrt() * y
    return (x - (1 - a).sqrt() * y) / a.sqrt()
