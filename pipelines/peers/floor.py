"""The floor under everything that replaces self-attention: none in the setting's levels. Pictures are meaningless."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .base import Draw, Setting, only_unet, replaced_processors


class ValueProcessor:
    """Attention that returns each token's own value, without projections of queries and keys."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


@contextmanager
def floor(pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """Each token's own value instead of attention."""
    with replaced_processors(only_unet(pipe, "the floor"), setting.levels, lambda original: ValueProcessor()):
        yield draw
