"""The floor under every method that replaces attention: the attention call just returns its values.

Projections, norms and rotations stay, as in every patched layer. The pictures are meaningless.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, LayerSpec, Preset, TokenLayout


@dataclass(frozen=True)
class OwnValues(AttentionMethod):
    """Every token's own value in place of attention, for any number and layout of tokens."""

    name: ClassVar[str] = "floor"
    presets: ClassVar[Mapping[str, Preset]] = {"balanced": Preset()}

    def supports(self, layer: LayerSpec) -> bool:
        return not layer.is_cross_attention

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return None

    def reason_layout(self, layout: TokenLayout) -> str | None:
        return None

    def build(self, layer: LayerSpec) -> AttentionFn:
        return _values


def _values(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    return v
