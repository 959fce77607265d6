"""Mixed precision: weights, optimizer, averages and losses stay in float32; the networks compute in `dtype`."""

from __future__ import annotations

import torch

from diffattn.machine import fastest_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def training_dtype(name: str, device: str) -> torch.dtype:
    """ "auto": bfloat16 where the device multiplies it in hardware. float16 is left out: it would need loss scaling."""
    if name == "auto":
        fastest = fastest_dtype(torch.device(device))
        return torch.float32 if fastest == torch.float16 else fastest
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)
