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
    AttentionMethod,
    LayerCall,
    LayerSpec,
    Preset,
    TokenLayout,
    join_exact,
    upcast_where_half_overflows,
)
from diffattn.methods.options import check, check_limits, is_int
from diffattn.methods.thresholds import below_smallest

MIN_TOKENS = 1024

TUNED = ((2, False), (2, True), (4, False), (4, True))
"""Factors that tuning chooses from, and whether means are taken."""


@dataclass(frozen=True)
class DownsampledKeys(AttentionMethod):
    """Options of downsampled keys.

    Every query attends to one key and value for each cell of `factor` x `factor` tokens, a share of 1 / factor² of the
    cost. Tokens without a place on the grid (text, registers) keep all their keys and are answered exactly; keys of the
    grid weigh as much as their cells beside them. Frames of a video, and reference pictures, are downsampled one by
    one.
    """

    factor: int = 2  # rows and columns of a cell, 2 or more
    pooled: bool = False  # means over the cells instead of their first tokens; rotated tokens then run exact
    min_tokens: int | None = None  # layers with fewer tokens run exact; None: 1,024
    max_level: int | None = None  # deepest level that is accelerated, 0 is the highest resolution; None: all

    name: ClassVar[str] = "keys"
    timed: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        # A quarter of the keys.
        "balanced": Preset(),
        # A sixteenth of the keys.
        "fast": Preset(options={"factor": 4}),
        # The published setting: a quarter of the keys, at the highest resolution only.
        "paper": Preset(options={"max_level": 0}),
    }

    def __post_init__(self) -> None:
        check(is_int(self.factor, 2), "factor", self.factor, "a whole number, 2 or more")
        check(isinstance(self.pooled, bool), "pooled", self.pooled, "True or False")
        check_limits(self)

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        """Options for tuning, which itself measures the number of tokens from which this pays."""
        return [{"factor": factor, "pooled": pooled, "min_tokens": 0} for factor, pooled in TUNED]

    def supports(self, layer: LayerSpec) -> bool:
        return not layer.is_cross_attention and (self.max_level is None or layer.level <= self.max_level)

    def declines(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return "masked: the mask differs between queries" if mask_rows > 1 else None

    def slower(self, num_tokens: int, device: str) -> str | None:
        return below_smallest(MIN_TOKENS if self.min_tokens is None else self.min_tokens, num_tokens)

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
