"""Inspect the variables of the code that called a denoiser, without changing them."""

import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor, nn

from diffattn.architectures.denoisers import Pipeline

SKIPPED = ("torch.", "diffattn.patching.", "diffattn.architectures.")
"""Modules whose frames hold no sampling loop."""


def callers() -> Iterator[FrameType]:
    """The calling frames, nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not str(frame.f_globals.get("__name__")).startswith(SKIPPED):
            yield frame
        frame = frame.f_back


def stacklevel() -> int:
    """The `stacklevel` at which a warning given by the caller of this function points to the nearest caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(SKIPPED):
        frame, level = frame.f_back, level + 1
    return level


def is_called(model: nn.Module) -> bool:
    """Whether a module is being called, hooks and all, rather than its `forward` alone; or a copy that shares its
    hooks, such as a replica of `nn.DataParallel`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            called = frame.f_locals.get("self")
            if called is model or getattr(called, "_forward_pre_hooks", None) is model._forward_pre_hooks:
                return True
        frame = frame.f_back
    return False


def schedulers_in(frame: FrameType) -> Iterator[Any]:
    """Schedulers among a frame's variables, among their attributes, and inside pipelines among those attributes."""
    names = [name for name in frame.f_code.co_names if name in frame.f_globals]
    for value in [*frame.f_locals.values(), *(frame.f_globals[name] for name in names)]:
        if issubclass(type(value), SchedulerMixin):
            yield value
        elif not issubclass(type(value), type | ModuleType | Tensor):
            parts = _attributes(value)
            inside = [_attributes(part) for part in parts if issubclass(type(part), Pipeline)]
            yield from (part for found in (parts, *inside) for part in found if issubclass(type(part), SchedulerMixin))


def _attributes(value: Any) -> list[Any]:
    """The attributes of an instance, read without running any code of its class."""
    try:
        return list(object.__getattribute__(value, "__dict__").values())
    except AttributeError:
        return []


def is_kept_by_caller(value: Any) -> bool:
    """Whether a caller holds an object in a local dictionary, as pipelines do that restore a processor later."""
    dicts = (found for frame in callers() for found in frame.f_locals.values() if type(found) is dict)
    return any(part is value for found in dicts for part in list(found.values()))
