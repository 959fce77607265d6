"""Metrics of picture pairs: the same prompt and seed, with and without acceleration.

Shapes: B pictures, H, W pixels; pictures are [B, 3, H, W] in 0..1.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_WINDOW = 11  # pixels: side of the Gaussian window of the published definition


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every pair.

    Args:
        a, b: pictures [B, 3, H, W] in 0..1.

    Returns:
        [B] in dB, on the pictures' device; higher is closer, infinite where a pair is identical.

    Raises:
        ValueError: shapes other than equal [B, 3, H, W], integer pictures, values that are NaN or outside 0..1.
    """
    a, b = _checked(a, b)
    return peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of every pair (Wang et al. 2004; Gaussian window of 11 pixels, σ = 1.5).

    Args:
        a, b: pictures [B, 3, H, W] in 0..1, at least 11 pixels high and wide.

    Returns:
        [B], at most 1, on the pictures' device; 1 where a pair is identical.

    Raises:
        ValueError: as `psnr`; pictures smaller than the window.
    """
    a, b = _checked(a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {list(a.shape)}")
    found = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return torch.as_tensor(found)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 at least (half precision would round the squared differences)."""
    if a.shape != b.shape:
        raise ValueError(f"both sets of pictures need the same shape, got {list(a.shape)} and {list(b.shape)}")
    for x in (a, b):
        if x.ndim != 4 or x.shape[1] != 3 or x.numel() == 0:
            raise ValueError(f"pictures must be [B, 3, H, W], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"pictures must be floating point in 0..1, got {x.dtype}")
        if not torch.isfinite(x).all():
            raise ValueError("pictures hold values that are NaN or infinite")
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"pictures must be in 0..1, got {x.min().item():.3g} to {x.max().item():.3g}")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)
