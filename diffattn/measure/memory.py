"""The peak memory of a call, and the memory of a device."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of a call in MiB, beyond what was allocated before it. Runs the call once.

    On CUDA this is the allocator's own count. On the CPU it follows every allocation and release of torch's allocator
    during the call, which omits memory of the libraries below it (packed weights of matrix products). None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        call()
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes a line to stderr when it starts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    return _peak(profile.profiler.kineto_results.events()) / 2**20


def total_memory(device: torch.device) -> float:
    """Bytes of memory of a device, infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _peak(events: Sequence[Any]) -> int:
    """The highest sum of all allocations up to some moment, in bytes."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
