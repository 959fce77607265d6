"""Masks over keys, as numbers that are added to logits."""

import torch
from torch import Tensor

MASKED = -1e4
"""The least that a mask adds to logits, for masked keys: a softmax over such keys alone stays finite."""


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask over keys, boolean (True: attended to) or additive, as finite numbers that are added to logits."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, MASKED)
    return mask.clamp(min=MASKED).to(dtype)


def key_mask_of(mask: Tensor, k: Tensor) -> Tensor:
    """A mask as [B, H, 1, M], a view.

    Args:
        mask: over keys, the same for every query.
        k: keys [B, H, M, D].

    Raises:
        ValueError: the mask does not broadcast to that.
    """
    wanted, given = (*k.shape[:2], 1, k.shape[2]), mask.shape
    fits = len(given) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(f"key_mask must broadcast to [B, H, 1, M] = {list(wanted)}, got {list(given)}")
    return mask.expand(wanted)
