"""The interface of a method: its options, and what it does to (q, k, v) of one attention layer.

Shapes: B batch, H heads, N query tokens, M key tokens, D channels per head, C = H·D.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

SOFTMAX = "softmax"
"""The kind of a layer that computes exact attention."""


@dataclass(frozen=True)
class LayerSpec:
    """What is known about one attention layer when patching."""

    name: str  # dotted path inside the denoiser
    level: int  # 0 is the highest resolution; one more for every halving
    num_heads: int
    head_dim: int
    is_cross_attention: bool = False
    upcast: bool = False  # the layer asks for fp32 logits (Stable Diffusion 2.x)
    kind: str = SOFTMAX  # what the unpatched layer computes: exact attention, or what it was trained with
    mediators: tuple[int, ...] = ()  # the numbers of mediators it learned, ascending


@dataclass
class LayerCall:
    """One call of one layer, made by the processor."""

    x: Tensor  # the layer's input [B, N, C], already normalised by the block
    grid: tuple[int, int]  # rows, columns of the image tokens
    num_context: int = 0  # tokens outside the grid; always exact keys, never pooled
    mask: Tensor | None = None  # additive, [B, H, 1 or N, M]
    phase: int = 0  # which entry of the schedule applies
    exact_heads: int = 0  # set by the function: heads, over all samples, that it ran exact
    mediate: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
    """The layer's own learned mediators, if any: (q, k, v, number of mediators) -> [B, H, N, D]."""


class AttentionFn(Protocol):
    """q [B, H, N, D], k, v [B, H, M, D] -> [B, H, N, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor: ...


@dataclass(frozen=True)
class Preset:
    """A named set of options, and the noise levels at which they apply (see `schedules.NoiseSchedule`)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[float, Mapping[str, Any] | str] | None = None


class AttentionMethod(ABC):
    """Base of every method: subclass it as a frozen dataclass whose fields are the method's options.

    This is everything that the rest of the package asks of a method; members with a default below only need to be
    overridden where a method differs.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]  # "balanced" among them
    replaces: ClassVar[str] = SOFTMAX  # the kind of layer it replaces, see `LayerSpec.kind`
    size_name: ClassVar[str | None] = None  # what `size` counts, in the plural; None: the method has no size
    tuned_by_change: ClassVar[bool] = False
    """Whether tuning searches for thresholds of the latents' change (`tuning.mediators`), rather than for one of
    `candidates` per layer and noise level."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from named options; an unknown one raises `ValueError` listing the allowed ones."""
        allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(unknown)} of method {cls.name!r}; allowed: {', '.join(allowed)}"
            )
        return cls(**options)

    @classmethod
    def suits(cls, layers: Sequence[LayerSpec]) -> bool:
        """Whether this method may be the default for a model with these self-attention layers."""
        return any(layer.kind == cls.replaces for layer in layers)

    @classmethod
    def candidates(cls) -> Sequence[Mapping[str, Any]]:
        """The options that tuning chooses from by default; empty: the method is not considered."""
        return ()

    @classmethod
    def options_for_size(cls, size: int) -> Mapping[str, Any]:
        """The options that give every layer this size at every noise level, whether or not it pays there.

        Raises:
            ValueError: the method has no size.
        """
        raise ValueError(f"method {cls.name!r} has no size to choose, got {size}")

    def size(self, num_tokens: int) -> int | None:
        """The size (in `size_name`) of a layer with `num_tokens` tokens; None: the method has no size."""
        return None

    def out_of_range(self, given: Collection[str], num_tokens: int) -> str | None:
        """The error message for an option that leaves nothing to accelerate at this picture size, or None.

        Args:
            given: names of the options that the user gave; only these can be an error.
            num_tokens: tokens of the largest layer.
        """
        return None

    def fit(self, layers: Sequence[LayerSpec]) -> Self:
        """The method for the layers of one model, with everything that depends on them filled in.

        Raises:
            ValueError: an option out of the range of what the layers allow.
        """
        return self

    def why_not(self, layer: LayerSpec) -> str | None:
        """Why the method cannot accelerate a layer at any picture size, or None."""
        if layer.kind != self.replaces:
            return f"{layer.kind} attention, which method {self.name!r} does not replace"
        return None if self.supports(layer) else f"level {layer.level} is not covered with these options"

    @abstractmethod
    def supports(self, layer: LayerSpec) -> bool:
        """Whether this method can accelerate the layer at some picture size."""

    @abstractmethod
    def declines(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        """Why a call must run exact, or None.

        Args:
            layer: the layer.
            num_tokens: N of this call.
            device: torch device type, such as "cpu" or "cuda".
            mask_rows: 0 without a mask, 1 for one mask over the keys, N for a separate mask per query.
        """

    @abstractmethod
    def build(self, layer: LayerSpec) -> AttentionFn:
        """The attention function of one layer."""


def half_overflows(layer: LayerSpec, dtype: torch.dtype) -> bool:
    """Whether the layer's logits need fp32: the layer asks for it and runs in fp16, whose range ends at 65,504."""
    return layer.upcast and dtype == torch.float16
