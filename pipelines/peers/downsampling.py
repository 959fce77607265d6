"""Fewer keys and values: those of every second row and column, or of 2×2 means.

Sampling is what Smith et al. do ("ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", 2024,
arXiv 2402.13573); pooling is the older form. Queries are all kept, so every token gets its own output.

As in their work, and in the measurements so far, only the tokens that are kept are projected to keys and values in a
UNet. `diffattn.patch(pipe, "keys")`, which serves transformers here, computes the same from keys and values of all
tokens, since it leaves the projections to the layer: the pictures agree, the times do not.

Shapes: B batch, N tokens on a square grid, C channels, f the factor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from diffattn.functional import downsample_tokens

from .agents import patched
from .base import Draw, SelfAttentionProcessor, Setting, replaced_processors, square_side


def shrink(x: Tensor, factor: int, pooled: bool = False) -> Tensor:
    """[B, N, C] -> [B, ceil(√N/f)², C]: every f-th row and column from the first, or means of f×f tokens (fewer at the
    far edges of an odd grid)."""
    side = square_side(x)
    return downsample_tokens(x[:, None], (side, side), factor, pooled=pooled)[:, 0]


class DownsampledKeys(SelfAttentionProcessor):
    """Attention of all tokens to fewer: the original processor with the smaller grid as its context.

    Averages commute with the projections, so this is the same as projecting first, without the work.
    """

    def __init__(self, original: Any, shrink: Callable[[Tensor], Tensor]) -> None:
        super().__init__(original)
        self.shrink = shrink

    def attend(self, attn: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        return self.original(attn, x, encoder_hidden_states=self.shrink(x), temb=temb)


SHRINK = {"sampled": partial(shrink, factor=2), "pooled": partial(shrink, factor=2, pooled=True)}


@contextmanager
def downsampling(kind: str, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """Keys and values as one of `SHRINK` makes them, at half the resolution; in transformers by `diffattn.patch`."""
    if getattr(pipe, "unet", None) is not None:
        with replaced_processors(pipe.unet, setting.levels, partial(DownsampledKeys, shrink=SHRINK[kind])):
            yield draw
        return
    with patched(pipe, "keys", factor=2, pooled=kind == "pooled", min_tokens=0):
        yield draw
