"""Mediator attention: how many of a model's learned mediators run at each noise level (Pu et al., "Efficient
Diffusion Transformer with Step-wise Dynamic Attention Mediators", ECCV 2024, arXiv 2408.05710).

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from diffattn.functional import mediator_side
from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, LayerSpec, Preset

SHARES = ("min", "mid", "max")
"""The smallest, middle and largest of the numbers a model learned; of two middle ones, the larger."""


@dataclass(frozen=True)
class MediatorAttention(AttentionMethod):
    """Options of mediator attention, for layers that learned it.

    The layer's own computation runs with a different number of mediators than the model is set to; "exact" in a
    schedule means the model's own setting (see `DiT.set_num_mediators`).
    """

    # A perfect square from the smallest to the largest number the model learned, or one of `SHARES`, which fit every
    # model; None leaves the layers as the model runs them.
    num_mediators: int | str | None = None

    name: ClassVar[str] = "mediator"
    replaces: ClassVar[str] = "mediator"
    size_name: ClassVar[str | None] = "mediators"
    tuned_by_change: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        # Few mediators while the picture is noise, all once detail appears.
        "balanced": Preset(
            schedule={0.7: {"num_mediators": "min"}, 0.4: {"num_mediators": "mid"}, 0.0: {"num_mediators": "max"}}
        ),
        # Never the largest number of mediators.
        "fast": Preset(schedule={0.5: {"num_mediators": "min"}, 0.0: {"num_mediators": "mid"}}),
    }

    def __post_init__(self) -> None:
        n = self.num_mediators
        if isinstance(n, str):
            if n not in SHARES:
                raise ValueError(f"num_mediators must be a perfect square, or one of {', '.join(SHARES)}, got {n!r}")
        elif n is not None:
            mediator_side(n)

    @classmethod
    def options_for_size(cls, size: int) -> Mapping[str, Any]:
        return {"num_mediators": size}

    def size(self, num_tokens: int) -> int | None:
        return self.num_mediators if isinstance(self.num_mediators, int) else None

    def supports(self, layer: LayerSpec) -> bool:
        return bool(layer.mediators)

    def fit(self, layers: Sequence[LayerSpec]) -> Self:
        numbers = {self._number(layer.mediators) for layer in layers if layer.mediators}
        return replace(self, num_mediators=numbers.pop()) if len(numbers) == 1 else self

    def _number(self, learned: Sequence[int]) -> int | None:
        """The number of mediators for a layer that learned these, ascending; `ValueError` if it is out of range."""
        n = self.num_mediators
        if isinstance(n, str):
            return {"min": learned[0], "mid": learned[len(learned) // 2], "max": learned[-1]}[n]
        if n is not None and not learned[0] <= n <= learned[-1]:
            raise ValueError(
                f"num_mediators must be a perfect square from {learned[0]} to {learned[-1]}, got {n}; "
                f"the model learned {', '.join(map(str, learned))}"
            )
        return n

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return "num_mediators is not given: the model's own setting runs" if self.num_mediators is None else None

    def build(self, layer: LayerSpec) -> AttentionFn:
        n = self._number(layer.mediators)

        def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
            assert n is not None
            assert call.mediate is not None
            return call.mediate(q, k, v, n)

        return attention
