"""Tiled self-attention: the tokens of each tile attend within themselves.

Shapes: B batch, N tokens on a square grid, C channels, t² tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from .base import Draw, SelfAttentionProcessor, Setting, replaced_processors, square_side


def cut(x: Tensor, tiles: int) -> Tensor:
    """[B, N, C] -> [B·t², N/t², C], tile after tile, row by row.

    Raises:
        ValueError: a grid that t does not divide.
    """
    side = square_side(x)
    if side % tiles:
        raise ValueError(f"a grid of {side}x{side} tokens does not divide into {tiles}x{tiles} tiles")
    cells = x.unflatten(1, (tiles, side // tiles, tiles, side // tiles))
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join(x: Tensor, tiles: int) -> Tensor:
    """The inverse of `cut`."""
    side = square_side(x)
    cells = x.unflatten(0, (-1, tiles, tiles)).unflatten(3, (side, side))
    return cells.transpose(2, 3).flatten(1, 4)


class TiledAttention(SelfAttentionProcessor):
    """The original processor on every tile."""

    def __init__(self, original: Any, tiles: int) -> None:
        super().__init__(original)
        self.tiles = tiles

    def attend(self, attn: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        return join(self.original(attn, cut(x, self.tiles), temb=temb), self.tiles)


@contextmanager
def tiled(tiles: int, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`tiles` × `tiles` tiles in the self-attention of the setting's levels."""
    with replaced_processors(pipe.unet, setting.levels, partial(TiledAttention, tiles=tiles)):
        yield draw
