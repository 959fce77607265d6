"""Tiles, training-free: attention within each part of the picture (HyperTile, 2023, https://github.com/tfernd/HyperTile).

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffattn.functional.tiled import attend_in_tiles
from diffattn.methods.base import (
    AttentionFn,
    Grid,
    LayerCall,
    LayerSpec,
    Preset,
    TokenLayout,
    join_exact,
    upcast_where_half_overflows,
)
from diffattn.methods.limited import LimitedMethod
from diffattn.methods.options import check, is_int

DEFAULT_TILES = 2

TUNED = (2, 4, 8)
"""Numbers of tiles along each axis that tuning chooses from."""


@dataclass(frozen=True)
class TiledAttention(LimitedMethod):
    """Options of tiles.

    A token attends only to its own tile instead of the whole picture. Tiles do not overlap; where they do not divide
    rows or columns evenly, some have one more. The number along an axis is the larger of `tiles` and what `tile_size`
    requires, whichever are given; 2 if neither is. In a video a tile reaches through all frames. Tokens without a
    position on the grid (text, registers) are seen by every tile and are answered exactly. Nothing is averaged, so
    rotated tokens are supported; reference pictures are not, since no tile is their counterpart.
    """

    tiles: int | None = None  # number along the rows and along the columns, 2 or more
    tile_size: int | None = None  # most tokens along a side of a tile; the cost then grows linearly with the picture
    min_tokens: int | None = None  # layers with fewer tokens run exact; None: as timed, else 1,024
    max_level: int | None = None  # deepest level that is accelerated, 0 is the highest resolution; None: all

    name: ClassVar[str] = "tiles"
    presets: ClassVar[Mapping[str, Preset]] = {
        # 2 x 2 tiles.
        "balanced": Preset(),
        # 4 x 4 tiles.
        "fast": Preset(options={"tiles": 4}),
        # The published default: tiles of 256 pixels, at the highest resolution of Stable Diffusion only.
        "paper": Preset(options={"tile_size": 32, "max_level": 0}),
    }

    def __post_init__(self) -> None:
        tiles, size = self.tiles, self.tile_size
        check(tiles is None or is_int(tiles, 2), "tiles", tiles, "a whole number, 2 or more, or None")
        check(size is None or is_int(size, 1), "tile_size", size, "a whole number, 1 or more, or None")
        self.check_limits()

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        """Options for tuning, which itself measures the number of tokens from which this pays off."""
        return [{"tiles": tiles, "min_tokens": 0} for tiles in TUNED]

    def reason_layout(self, layout: TokenLayout) -> str | None:
        if layout.references:
            return f"tokens of {len(layout.grids)} pictures: tiles cover only one"
        if self.on(layout.grid) == (1, 1):
            return f"a grid of {'x'.join(map(str, layout.grid))} is a single tile"
        return None

    def on(self, grid: Grid) -> tuple[int, int]:
        """Tiles along the rows and along the columns of a grid."""
        number = DEFAULT_TILES if self.tiles is None and self.tile_size is None else self.tiles or 1
        rows, columns = (
            min(max(number, 1 if self.tile_size is None else -(-length // self.tile_size)), length)
            for length in grid[-2:]
        )
        return rows, columns

    def build(self, layer: LayerSpec) -> AttentionFn:
        return upcast_where_half_overflows(layer, self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layout = call.layout
        out = attend_in_tiles(layout.on_grid(q), k, v, layout.grid, self.on(layout.grid), layout.split, call.mask)
        return join_exact(out, q, k, v, call)
