"""What the code that called a denoiser has at hand: read off the frames above, which are left as they are."""

import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor

SKIPPED = ("torch.", "diffattn.patching.", "diffattn.architectures.")
"""Modules whose frames hold no sampling loop."""


def callers() -> Iterator[FrameType]:
    """The frames above, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not str(frame.f_globals.get("__name__")).startswith(SKIPPED):
            yield frame
        frame = frame.f_back


def schedulers_in(frame: FrameType) -> Iterator[Any]:
    """Schedulers among the variables of a frame, or among the attributes of one."""
    names = [name for name in frame.f_code.co_names if name in frame.f_globals]
    for value in [*frame.f_locals.values(), *(frame.f_globals[name] for name in names)]:
        if issubclass(type(value), SchedulerMixin):
            yield value
        elif not issubclass(type(value), type | ModuleType | Tensor):
            yield from (part for part in _attributes(value) if issubclass(type(part), SchedulerMixin))


def _attributes(value: Any) -> list[Any]:
    """Of an instance, without running any code of its class."""
    try:
        return list(object.__getattribute__(value, "__dict__").values())
    except AttributeError:
        return []


def is_kept_by_caller(value: Any) -> bool:
    """Whether a caller has an object in a dictionary of its own, as pipelines do that will put a processor back."""
    dicts = (found for frame in callers() for found in frame.f_locals.values() if type(found) is dict)
    return any(part is value for found in dicts for part in list(found.values()))
