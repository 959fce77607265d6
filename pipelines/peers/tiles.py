"""Tiled self-attention: the tokens of each tile attend within themselves, by `diffattn.patch(pipe, "tiles")`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .agents import patched
from .base import Draw, Setting


@contextmanager
def tiled(tiles: int, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`tiles` × `tiles` tiles in the self-attention of the setting's levels, whatever their number of tokens."""
    with patched(pipe, "tiles", tiles=tiles, min_tokens=0, layers=lambda spec: spec.level in setting.levels):
        yield draw
