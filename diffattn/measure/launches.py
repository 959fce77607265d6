"""How many operations a call launches on a device, and how long they take, according to torch's profiler."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from diffattn.measure.clock import synchronize

KERNELS, OPERATIONS = "kernels", "operations"


@dataclass(frozen=True)
class Launches:
    """The operations of one call. On CUDA, what runs on the device: kernels and copies; elsewhere, the torch operations
    that the call itself makes, views included."""

    number: int
    seconds: float  # their durations, added
    what: str  # `KERNELS` or `OPERATIONS`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_launches(call: Callable[[], Any], device: torch.device) -> Launches:
    """Profile a call. It is run once before, so that nothing is built or chosen while profiling."""
    call()
    synchronize(device)
    on_cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes a line to stderr when it starts
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    found = profile.events() or []
    if on_cuda:
        counted = [event for event in found if event.device_type == DeviceType.CUDA]
    else:
        counted = [event for event in found if event.cpu_parent is None and event.name.startswith("aten::")]
    seconds = sum(event.time_range.elapsed_us() for event in counted) / 1e6
    return Launches(len(counted), seconds, KERNELS if on_cuda else OPERATIONS)
