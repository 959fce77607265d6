"""Memory that a job or a model no longer needs, given back to the system."""

import ctypes
import gc
import sys

import torch


def give_back(device: torch.device, collect: bool = False) -> None:
    """Return freed memory to the system, which the allocators keep otherwise.

    glibc keeps what was freed below a block still in use; after many models of different sizes that is more than the
    models themselves. Elsewhere than with glibc only the device's memory is returned.

    Args:
        device: where models run.
        collect: collect garbage before, as after a model was let go.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
