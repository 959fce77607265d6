"""What is not finite is never written over what is."""

from collections.abc import Mapping

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """Loss, gradient or weights are not finite: training stopped, or something was not written."""


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise `NonFiniteLoss` if there are NaN or infinite values among weights that are about to be written."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise NonFiniteLoss(
            f"{len(bad)} of the {len(weights)} weights, such as {bad[0]}, are not finite: {what} is not written; try a "
            "lower optim.lr, optim.clip=1, or run.precision=fp32"
        )
