"""Downsampled keys and values, training-free (Smith et al., "ToDo: Token Downsampling for Efficient Generation of
High-Resolution Images", 2024, arXiv 2402.13573).

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffattn.functional.downsampled import Cells, attend_to_cells
from diffattn.methods.base import (
    AttentionFn,
    LayerCall,
    LayerSpec,
    Preset,
    TokenLayout,
    join_exact,
    upcast_where_half_overflows,
)
from diffattn.methods.limited import LimitedMethod
from diffattn.methods.options import check, is_int

MAX_FACTOR = 1024
"""A cell of more rows and columns than any grid has is the whole grid, as this one is of most."""

TUNED = ((2, False), (2, True), (4, False), (4, True))
"""Factors that tuning chooses from, and whether means are taken."""


@dataclass(frozen=True)
class DownsampledKeys(LimitedMethod):
    """Options of downsampled keys.

    Every query attends to one key and value per cell of `factor` x `factor` tokens, at 1 / factor² of the cost. Tokens
    without a position on the grid (text, registers) keep all their keys and are answered exactly; beside them, a key of
    the grid is weighted by the number of tokens in its cell. Frames of a video, and reference pictures, are downsampled
    one by one.
    """

    factor: int = 2  # rows and columns of a cell, 2 to MAX_FACTOR
    pooled: bool = False  # means over the cells instead of their first tokens; rotated tokens then run exact
    min_tokens: int | None = None  # layers with fewer tokens run exact; None: as timed, else 1,024
    max_level: int | None = None  # deepest level that is accelerated, 0 is the highest resolution; None: all

    name: ClassVar[str] = "keys"
    presets: ClassVar[Mapping[str, Preset]] = {
        # A quarter of the keys.
        "balanced": Preset(),
        # A sixteenth of the keys.
        "fast": Preset(options={"factor": 4}),
        # The published setting: a quarter of the keys, at the highest resolution only.
        "paper": Preset(options={"max_level": 0}),
    }

    def __post_init__(self) -> None:
        within = is_int(self.factor, 2) and self.factor <= MAX_FACTOR
        check(within, "factor", self.factor, f"a whole number from 2 to {MAX_FACTOR}")
        check(isinstance(self.pooled, bool), "pooled", self.pooled, "True or False")
        self.check_limits()

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        """Options for tuning, which itself measures the number of tokens from which this pays off."""
        return [{"factor": factor, "pooled": pooled, "min_tokens": 0} for factor, pooled in TUNED]

    def reason_layout(self, layout: TokenLayout) -> str | None:
        if self.pooled and layout.rotated:
            return "rotated tokens cannot be averaged into pooled keys"
        return None

    def build(self, layer: LayerSpec) -> AttentionFn:
        return upcast_where_half_overflows(layer, self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layout = call.layout
        cells = Cells(layout.grids, self.factor, self.pooled)
        out = attend_to_cells(layout.on_grid(q), k, v, cells, layout.split, call.mask)
        return join_exact(out, q, k, v, call)
