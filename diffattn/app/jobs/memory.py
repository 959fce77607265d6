"""Returns memory that a job or a model no longer needs to the system."""

import ctypes
import gc
import sys

import torch


def give_back(device: torch.device, collect: bool = False) -> None:
    """Return freed memory to the system, which the allocators would keep otherwise.

    glibc keeps what was freed below a block still in use; after many models of different sizes that is more than the
    models themselves. Without glibc, only the device's memory is returned.

    Args:
        device: where models run.
        collect: collect garbage first, as after a model has been dropped.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
