"""The filters of the fixed stem, from the pictures themselves."""

from __future__ import annotations

import torch
from emoji_sd.data import to_float
from torch import Tensor


def whitening_filters(images: Tensor, filters: int, kernel: int = 4, eps: float = 1e-2) -> Tensor:
    """The principal directions of kernel×kernel patches, scaled so that each has variance 1 (Coates & Ng 2012).

    uint8 [N, 3, S, S] → [filters, 3, kernel, kernel]; `eps` of the largest variance is added to all of them.
    """
    x = to_float(images[:: max(len(images) // 2000, 1)])
    patches = x.unfold(2, kernel, kernel).unfold(3, kernel, kernel)  # [n, 3, rows, columns, kernel, kernel]
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * kernel**2)
    variances, directions = torch.linalg.eigh(flat.double().T.cov())
    scale = (variances + eps * variances[-1]).rsqrt()
    found = (directions * scale).T.flip(0)[:filters]
    return found.reshape(-1, 3, kernel, kernel).float()
