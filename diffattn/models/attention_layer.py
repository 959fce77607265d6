"""The base of attention layers. A new one is a file with a subclass, and a line in `attention.ATTENTION`.

Shapes: B batch, H heads, N = h·w tokens in row-major order on a grid (h, w), D channels per head,
C = H·D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from diffattn.functional.checks import check_grid

SOFTMAX_PARTS = ("qkv", "proj", "q_norm", "k_norm")
"""The modules of a softmax layer; any others are specific to a layer."""

OPEN = 1.2784645
"""SiLU of this is 1: the bias of a gate that lets everything through."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class AttentionOptions:
    """The options shared by the layers of one model."""

    num_heads: int
    grid: tuple[int, int]  # of the sample size; other grids resize the position biases
    qk_norm: bool = False
    mediators: tuple[int, ...] = ()  # the numbers of mediators with biases of their own, ascending
    num_agents: int = 64
    agent_scale_exponent: float = 0.3
    agent_shortcut: float = 0.075
    by_name: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # attention -> options of its own


class HeadNorm(nn.RMSNorm):
    """RMS norm in the dtype of its weight, which stays fp32 under autocast; returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class TokenConv(nn.Conv2d):
    """Depth-wise convolution of tokens [B, N, C] on their grid, with zero padding."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w], channels side by side in memory
        return super().forward(image).permute(0, 2, 3, 1).flatten(1, 2)


class Attention(nn.Module, ABC):
    """The attention of a block, and its interface for the block, for initial weights and for conversion."""

    convolves_before: ClassVar[tuple[str, ...]] = ()
    """Where its block adds a depth-wise convolution of the tokens first: before "attention", before "mlp"."""
    is_official: ClassVar[bool] = False  # whether the layout of official checkpoints has a place for its weights
    learns: ClassVar[bool] = True  # whether it computes something else than softmax layers, and can be taught

    @abstractmethod
    def forward(self, x: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        """x [B, N, C] -> [B, N, C]; `num_mediators` is for the layers that have any."""

    def own_names(self) -> set[str]:
        """Names of its weights that a softmax layer does not have."""
        return {name for name in self.state_dict() if name.split(".")[0] not in SOFTMAX_PARTS}

    def softmax_weights(self) -> dict[str, Tensor]:
        """Those of its weights that a softmax layer also has."""
        return {name: weight for name, weight in self.state_dict().items() if name not in self.own_names()}

    def take(self, other: "Attention") -> dict[str, Tensor]:
        """The weights of this layer taken from another one, by their names here.

        Omitted ones among `own_names` keep their values, or are set to something neutral.
        """
        if type(other) is type(self):
            return other.state_dict()
        return self.take_softmax(other.softmax_weights())

    def take_softmax(self, weights: Weights) -> dict[str, Tensor]:
        """Like `take`, from a softmax layer with these weights."""
        return dict(weights)

    def official_weights(self, num_mediators: int) -> dict[str, Tensor]:
        """The weights by their official names; only for attention that is official."""
        return self.state_dict()


class LayerProcessor(Protocol):
    """A replacement for a layer's `attend`: a plain object, not saved with the model.

    It gets the layer, its input x [B, N, C], the projected and normed q, k, v [B, H, N, D], and the other arguments of
    `attend`; it returns [B, H, N, D].
    """

    def __call__(
        self,
        layer: "AttentionLayer",
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        num_mediators: int,
    ) -> Tensor: ...


class AttentionLayer(Attention):
    """Projections around what a subclass does with q, k and v."""

    qkv_bias: ClassVar[bool] = True

    def __init__(self, dim: int, options: AttentionOptions) -> None:
        super().__init__()
        self.processor: LayerProcessor | None = None
        self.num_heads = options.num_heads
        head_dim = dim // options.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=self.qkv_bias)
        self.q_norm = HeadNorm(head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.processor is None:
            out = self.attend(q, k, v, grid, num_mediators)
        else:
            out = self.processor(self, x, q, k, v, grid, num_mediators)
        return self.proj(self.finish(join(out), x, v, grid))

    def set_processor(self, processor: LayerProcessor | None) -> None:
        """Replace `attend` by a processor; None restores it."""
        self.processor = processor

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]"""

    def finish(self, out: Tensor, x: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Applied between attention and output projection, e.g. a local term or a gate.

        Args:
            out: the output of `attend`, heads joined [B, N, C].
            x: the layer's input [B, N, C].
            v: values [B, H, N, D].
            grid: (h, w).
        """
        return out


def join(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, C]"""
    return x.transpose(1, 2).flatten(2)


def split(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, H, N, D]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def on_grid(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """The tokens [B, H, N, D] of a grid, and the number of preceding tokens off the grid.

    Raises:
        ValueError: the grid has more tokens than there are.
    """
    apart = x.shape[2] - grid[0] * grid[1]
    if apart < 0:
        check_grid(grid, x.shape[2])
    return x[:, :, apart:], apart


def check_all_on_grid(name: str, x: Tensor, grid: tuple[int, int]) -> None:
    """Raise `ValueError` if there are tokens [B, N, C] outside the grid."""
    if (apart := x.shape[1] - grid[0] * grid[1]) > 0:
        raise ValueError(
            f"{name} attention takes no global tokens: a grid of {grid[0]}x{grid[1]} has {x.shape[1] - apart} tokens, "
            f"got {x.shape[1]}"
        )
    check_grid(grid, x.shape[1])
