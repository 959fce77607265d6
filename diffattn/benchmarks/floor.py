"""The floor under every method that replaces attention: the attention call alone returns the values it is given.

Projections, norms and rotations stay, as they do in every patched layer. The pictures mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, LayerSpec, Preset, TokenLayout


@dataclass(frozen=True)
class OwnValues(AttentionMethod):
    """Every token's own value in place of attention, for any number of tokens, wherever they lie."""

    name: ClassVar[str] = "floor"
    presets: ClassVar[Mapping[str, Preset]] = {"balanced": Preset()}

    def supports(self, layer: LayerSpec) -> bool:
        return not layer.is_cross_attention

    def declines(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return None

    def reason_layout(self, layout: TokenLayout) -> str | None:
        return None

    def build(self, layer: LayerSpec) -> AttentionFn:
        return _values


def _values(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    return v
