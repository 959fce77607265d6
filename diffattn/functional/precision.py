"""Keeps statistics precise, whatever the dtype of the tensors and autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast within the block, so that products keep their factors' dtype; a no-op on the meta device."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
