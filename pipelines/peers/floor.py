"""The floor under all that replaces self-attention: none at all in the setting's levels. Its pictures mean nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffattn.benchmarks.variants import ValueProcessor

from .base import Draw, Setting, replaced_processors


@contextmanager
def floor(pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """Each token's own value instead of attention."""
    with replaced_processors(pipe.unet, setting.levels, lambda original: ValueProcessor()):
        yield draw
