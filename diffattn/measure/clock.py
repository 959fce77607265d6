"""The clock of every timing: events on the current stream of a CUDA device, seconds of the machine elsewhere."""

import time
from typing import Any

import torch

Mark = Any
"""A point in time on a device: a CUDA event, or seconds of `time.perf_counter`."""


def mark(device: torch.device | str) -> Mark:
    """The point in time when a device has done all work given to it so far; on CUDA nothing waits for it."""
    if torch.device(device).type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    synchronize(device)
    return time.perf_counter()


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds between two marks of one device, which has reached both."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind != "cpu":
        torch.accelerator.synchronize()
