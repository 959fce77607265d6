"""This project's own: a shipped preset of agent attention, unchanged, and recipes from files."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffattn import DiffAttnWarning, patch

from .base import Draw, LeftOut, Setting


@contextmanager
def agent(preset: str, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`diffattn.patch(pipe, preset=...)`, the smallest number of tokens excepted where the setting names one."""
    options: dict[str, Any] = {} if setting.min_tokens is None else {"min_tokens": setting.min_tokens}
    with patched(pipe, "agent", preset=preset, **options):
        yield draw


@contextmanager
def recipe(path: str, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`diffattn.patch(pipe, recipe=...)`, such as one that `diffattn tune` wrote."""
    with patched(pipe, None, recipe=path):
        yield draw


@contextmanager
def patched(pipe: Any, method: str | None, **arguments: Any) -> Iterator[None]:
    """`diffattn.patch(pipe, method, ...)` within the block; `LeftOut` where it cannot be patched."""
    try:
        handle = patch(pipe, method, calibrate=False, **arguments)
    except ValueError as error:
        raise LeftOut(str(error)) from None
    with handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffAttnWarning)  # the results say how many layers are accelerated
        yield
