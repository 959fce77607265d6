"""The interface of a method: its options, and what it does to (q, k, v) of one attention layer.

Shapes: B batch, H heads, N query tokens, M key tokens, D channels per head, C = H·D.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.functional import scaled_dot_product_attention

SOFTMAX = "softmax"
"""The kind of a layer that computes exact attention."""

Grid = tuple[int, ...]
"""Rows and columns of image tokens, or frames, rows and columns of a video's; row-major."""


@dataclass(frozen=True)
class LayerSpec:
    """What is known about one attention layer when patching."""

    name: str  # dotted path inside the denoiser
    level: int  # 0 is the highest resolution; one more for every halving
    num_heads: int
    head_dim: int
    is_cross_attention: bool = False
    upcast: bool = False  # the layer asks for fp32 logits (Stable Diffusion 2.x)
    context: Literal["none", "first", "last"] = (
        "none"  # where tokens without a position on the grid are: text, registers
    )
    keys_only: bool = False  # whether those tokens have keys and values, but no queries
    rotated: bool = False  # whether queries and keys carry their position as a rotation, and must not be averaged
    references_first: bool = False  # whether the tokens of reference pictures precede the picture's
    copies: int = 1  # how often the sequence holds the picture's tokens, each time with other contents
    exact: str | None = None  # why it must run exact whatever its processor
    kind: str = SOFTMAX  # what the unpatched layer computes: exact attention, or what it was trained with
    mediators: tuple[int, ...] = ()  # the numbers of mediators it learned, ascending


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a layer are: those of the picture and of any reference pictures, and before or after all of
    these the context: text, registers, and whatever else has no position on a grid."""

    grids: tuple[Grid, ...]  # of the picture or video and its references, in the order of the tokens
    num_context: int = 0
    context_first: bool = False
    rotated: bool = False  # see `LayerSpec`
    picture: int = 0  # which of the grids is the picture's or video's: the first or the last

    @property
    def grid(self) -> Grid:
        """The grid of the picture or video."""
        return self.grids[self.picture]

    @property
    def references(self) -> tuple[Grid, ...]:
        """The grids of reference pictures, or of earlier frames."""
        return self.grids[: self.picture] + self.grids[self.picture + 1 :]

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """`grid` of a picture: methods that support only plain layouts never get another."""
        rows, columns = self.grid
        return rows, columns

    @property
    def num_tokens(self) -> int:
        """Tokens with a position on a grid."""
        return sum(prod(grid) for grid in self.grids)

    @property
    def has_context(self) -> bool:
        """Whether there are tokens without a position; assumed while their number is unknown in compiled code."""
        return not guard_or_false(self.num_context == 0)

    @property
    def is_plain(self) -> bool:
        """Whether all tokens form one grid of rows and columns, and may be averaged."""
        return len(self.grids) == 1 and len(self.grid) == 2 and not self.rotated and not self.num_context

    def on_grid(self, x: Tensor) -> Tensor:
        """The tokens with a position: [..., N + c, D] -> [..., N, D], a view."""
        return x.narrow(-2, self.num_context if self.context_first else 0, self.num_tokens)

    def context(self, x: Tensor) -> Tensor:
        """The tokens without a position: [..., N + c, D] -> [..., c, D], a view."""
        return x.narrow(-2, 0 if self.context_first else self.num_tokens, self.num_context)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with a position, and those without."""
        return self.on_grid(x), self.context(x)

    def join(self, on_grid: Tensor, context: Tensor) -> Tensor:
        """[..., N, D] and [..., c, D] -> [..., N + c, D], in the layer's order."""
        if guard_or_false(self.num_context == 0):
            return on_grid
        return torch.cat((context, on_grid) if self.context_first else (on_grid, context), dim=-2)


@dataclass
class LayerCall:
    """One call of one layer, made by the processor."""

    x: Tensor | None  # the layer's input [B, N, C], already normalised by the block; None where it is another's
    grid: Grid  # of the image tokens
    mask: Tensor | None = None  # boolean (True: attended to) or additive, [B or 1, H or 1, 1 or N, M]
    context_mask: Tensor | None = None  # of the queries off the grid, [B or 1, H or 1, c, M], where theirs differs
    phase: int = 0  # which entry of the schedule applies
    exact_heads: int = 0  # set by the function: heads, over all samples, that it ran exact
    mediate: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
    """The layer's own learned mediators, if any: (q, k, v, number of mediators) -> [B, H, N, D]."""
    layout: TokenLayout = None  # type: ignore[assignment]  # None: the grid, and nothing else
    memory: dict[str, Any] | None = None
    """What the method keeps for later calls of this layer in the same phase and run; if a step makes several calls, for
    the same one of them. None where nothing can be kept: in compiled code, and with gradients."""
    is_trial: bool = False  # only the method itself is timed: no head is to fall back to exact attention
    fixed_heads: tuple[int, ...] = ()  # in compiled code, the heads that are to run exact, in ascending order

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = TokenLayout((self.grid,))


class AttentionFn(Protocol):
    """q [B, H, N, D], k, v [B, H, M, D] -> [B, H, N, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor: ...


EXACT_SHARE = "share of heads that run exact"
"""In `LayerCall.memory`: set by a method whose heads may fall back to exact attention, for the calls to come."""

EXACT_HEADS = "heads that run exact"
"""Beside it: their indices, [B, H] of them as two tensors, or None if there are none."""


@dataclass(frozen=True)
class Preset:
    """A named set of options, and the noise levels at which they apply (see `schedules.NoiseSchedule`)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[float, Mapping[str, Any] | str] | None = None


class AttentionMethod(ABC):
    """Base of every method: subclass it as a frozen dataclass whose fields are the method's options.

    This is everything that the rest of the package asks of a method; members with a default below only need to be
    overridden where a method differs. Each `reason_...` says why attention runs exact; None: it need not.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]  # "balanced" among them
    replaces: ClassVar[str] = SOFTMAX  # the kind of layer it replaces, see `LayerSpec.kind`
    size_name: ClassVar[str | None] = None  # what `size` counts, in the plural; None: the method has no size
    timed: ClassVar[bool] = False
    """Whether speed also decides which calls are accelerated: as `reason_slower` guesses, until both were timed."""
    tuned_by_change: ClassVar[bool] = False
    """Whether tuning searches for thresholds of the latents' change (`tuning.mediators`) instead of choosing among
    `candidates` per layer and noise level."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from named options; an unknown one raises `ValueError` listing the allowed ones."""
        allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(map(str, set(options) - set(allowed)))
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
        """What is wrong with an option that leaves nothing to accelerate at this picture size, or None.

        Args:
            given: names of the options that the user gave; only these can be wrong.
            num_tokens: tokens of the largest layer.
        """
        return None

    def fit(self, layers: Sequence[LayerSpec]) -> Self:
        """The method for the layers of one model, with everything that depends on them filled in.

        Raises:
            ValueError: an option out of the range of what the layers allow.
        """
        return self

    def reason_layer(self, layer: LayerSpec) -> str | None:
        """Why the method cannot accelerate a layer at any picture size, or None."""
        if layer.kind != self.replaces:
            return f"{layer.kind} attention, which method {self.name!r} does not replace"
        return None if self.supports(layer) else f"level {layer.level} is not covered with these options"

    @abstractmethod
    def supports(self, layer: LayerSpec) -> bool:
        """Whether this method can accelerate the layer at some picture size."""

    @abstractmethod
    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        """Why a call must run exact, whichever is faster, or None.

        Args:
            layer: the layer.
            num_tokens: N of this call.
            device: torch device type, such as "cpu" or "cuda".
            mask_rows: 0 without a mask, 1 for one mask over the keys, N for a separate mask per query.
        """

    def reason_slower(self, num_tokens: int, device: str) -> str | None:
        """Why exact attention is presumably faster for a call of `num_tokens` on a type of device, or None. An option
        `min_tokens` decides if the user gave it; otherwise this is a guess, which holds until both have been timed."""
        return None

    @property
    def checks_heads(self) -> bool:
        """Whether heads may fall back to exact attention, as `EXACT_SHARE` in the memory of a layer then says."""
        return False

    @property
    def is_size_given(self) -> bool:
        """Whether the user gave the number of tokens from which the method is used, so that nothing is to be timed."""
        return getattr(self, "min_tokens", None) is not None

    def reason_layout(self, layout: TokenLayout) -> str | None:
        """Why the method does not support this layout of tokens, or None. By default only one grid of rows and columns
        is supported; a method that overrides this gets all tokens in q, k and v, and their layout in `LayerCall`."""
        if layout.is_plain:
            return None
        if layout.num_context:
            return f"method {self.name!r} cannot follow {layout.num_context} tokens of context beside the picture's"
        what = "rotated tokens" if layout.rotated else f"tokens on {' + '.join(_text(g) for g in layout.grids)}"
        return f"method {self.name!r} cannot follow {what}"

    @abstractmethod
    def build(self, layer: LayerSpec) -> AttentionFn:
        """The attention function of one layer."""


def _text(grid: Grid) -> str:
    return "x".join(map(str, grid))


def half_overflows(layer: LayerSpec, dtype: torch.dtype) -> bool:
    """Whether the layer's logits need fp32: the layer asks for it and runs in fp16, whose range ends at 65,504."""
    return layer.upcast and dtype == torch.float16


def upcast_where_half_overflows(layer: LayerSpec, attend: AttentionFn) -> AttentionFn:
    """`attend`, in fp32 where the layer needs it, see `half_overflows`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        if half_overflows(layer, q.dtype):
            return attend(q.float(), k.float(), v.float(), call).to(v.dtype)
        return attend(q, k, v, call)

    return attention


def join_exact(out: Tensor, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    """The output of all tokens of a call, with exact attention for those without a position on a grid.

    Args:
        out: of the tokens with a position [B, H, N, D].
        q, k, v: of all tokens [B, H, N + c, D].
        call: the call.
    """
    layout = call.layout
    if guard_or_false(layout.num_context == 0):
        return out
    mask = call.mask if call.context_mask is None else call.context_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    text = layout.context(q)
    if call.context_mask is not None or guard_or_false(layout.num_context > 0):
        return layout.join(out, scaled_dot_product_attention(text, k, v, attn_mask=mask))
    asked = torch.cat((layout.on_grid(q)[:, :, :1], text), dim=2)  # in compiled code there may be no text at all
    return layout.join(out, scaled_dot_product_attention(asked, k, v, attn_mask=mask)[:, :, 1:])
