"""Metrics of picture pairs: the same prompt and seed, with and without acceleration.

Shapes: B pictures, H, W pixels; pictures are [B, 3, H, W] in 0..1. Latents are [B, ...] of any shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_WINDOW = 11  # pixels: side of the Gaussian window of the published definition
WHITE_TOLERANCE = 0.03  # of the range 0..1: a pixel is background if no channel is further from white
MARGIN = 2  # pixels around the foreground that count as foreground too


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


def foreground(reference: Tensor, tolerance: float = WHITE_TOLERANCE, margin: int = MARGIN) -> Tensor:
    """The pixels of a picture on white that are not background.

    A pixel is foreground if any channel is below 1 - `tolerance`, or if such a pixel lies within `margin` rows and
    `margin` columns of it (dilation with a square of 2·margin + 1).

    Args:
        reference: unaccelerated pictures [B, 3, H, W] in 0..1.
        tolerance: largest distance from white of a background pixel, at least 0 and below 1.
        margin: pixels, 0 or more.

    Returns:
        bool [B, 1, H, W]; nothing set where the picture is white.

    Raises:
        ValueError: as `psnr`; a tolerance or margin that is not allowed.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
    if margin < 0:
        raise ValueError(f"margin must be 0 or more, got {margin}")
    reference, _ = _checked(reference, reference)
    coloured = (reference < 1 - tolerance).any(dim=1, keepdim=True)
    return F.max_pool2d(coloured.float(), 2 * margin + 1, stride=1, padding=margin).bool()


def foreground_psnr(a: Tensor, reference: Tensor, tolerance: float = WHITE_TOLERANCE, margin: int = MARGIN) -> Tensor:
    """Peak signal-to-noise ratio over the `foreground` of the reference: flat white around it hides no error.

    -10·log10 of the mean squared difference over the three channels of the foreground pixels. What `a` paints outside
    the foreground does not count, so report `psnr` as well.

    Args:
        a: pictures to judge [B, 3, H, W] in 0..1.
        reference: the unaccelerated pictures; only these determine the foreground.
        tolerance, margin: see `foreground`.

    Returns:
        [B] in dB, on the pictures' device; infinite where the foregrounds are identical, NaN for a reference without
        foreground (average with `mean_of_known`).

    Raises:
        ValueError: as `foreground`; unequal shapes.
    """
    a, reference = _checked(a, reference)
    mask = foreground(reference, tolerance, margin)
    error = ((a - reference).square().mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3))
    return -10 * (error / mask.sum(dim=(1, 2, 3))).log10()


def mean_of_known(values: Tensor | Sequence[float]) -> float | None:
    """The mean of the values that are not NaN; None if all are. Infinite if one of them is."""
    values = torch.as_tensor(values, dtype=torch.float64)
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def latent_relative_error(latents: Tensor, exact: Tensor) -> Tensor:
    """Relative error ‖x - x*‖ / ‖x*‖ of every sample, in the L2 norm over everything but the batch.

    Args:
        latents: x, [B, ...].
        exact: x*, of the unaccelerated run, of the same shape.

    Returns:
        [B], at least 0; 0 where both are identical. NaN or infinite where x* is all zero.

    Raises:
        ValueError: unequal shapes.
    """
    if latents.shape != exact.shape or latents.ndim < 2:
        raise ValueError(f"latents must be [B, ...] of one shape, got {list(latents.shape)} and {list(exact.shape)}")
    x, true = latents.float().flatten(1), exact.float().flatten(1)
    return (x - true).norm(dim=1) / true.norm(dim=1)


class LatentTrace:
    """The latents after every step of one run; give it to a pipeline as `callback_on_step_end`.

    Attributes:
        steps: latents [B, ...] after each step, float32 on the CPU.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            self.steps = []
        self.steps.append(kwargs["latents"].detach().to("cpu", torch.float32, copy=True))
        return {}

    def errors(self, exact: "LatentTrace") -> list[list[float]]:
        """`latent_relative_error` against the unaccelerated run: one list per picture, one value per step.

        Raises:
            ValueError: runs of different length (with other numbers of steps only the last latents compare).
        """
        if len(self.steps) != len(exact.steps) or not self.steps:
            raise ValueError(
                f"both runs need the same number of steps, one or more; got {len(self.steps)} and {len(exact.steps)}"
            )
        by_step = [latent_relative_error(x, true) for x, true in zip(self.steps, exact.steps, strict=True)]
        return torch.stack(by_step, dim=1).tolist()


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
            raise ValueError("pictures contain values that are NaN or infinite")
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"pictures must be in 0..1, got {x.min().item():.3g} to {x.max().item():.3g}")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)
