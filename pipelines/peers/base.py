"""The parts that peers share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffattn.architectures.denoisers import denoiser_of, self_attention_layers
from diffattn.benchmarks.variants import LeftOut
from diffattn.methods.base import LayerSpec

__all__ = [
    "Draw",
    "LeftOut",
    "Peer",
    "SelfAttentionProcessor",
    "Setting",
    "denoiser_of",
    "only_unet",
    "replaced_processors",
    "restored",
    "self_attention",
    "square_side",
]

Draw = Callable[..., Any]
"""Calls the pipeline; takes its keyword arguments and returns its output."""


@dataclass(frozen=True)
class Setting:
    """What a peer needs to know about the comparison."""

    levels: tuple[int, ...] = (0, 1)  # resolutions whose self-attention ToMe, downsampling and tiles change
    steps: int = 20  # sampling steps of a full run
    min_tokens: int | None = None  # of the agents; None: the thresholds they ship with


Peer = Callable[[Any, Draw, Setting], AbstractContextManager[Draw]]
"""`with peer(pipe, draw, setting) as draw`: within, the pipeline is changed, and `draw` calls it.

Afterwards the pipeline is exactly as before, also after an exception. `LeftOut` says why a peer cannot run.
"""


class SelfAttentionProcessor:
    """A processor for self-attention without a mask, around the original one. A subclass per peer."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(f"{type(self).__name__} is for self-attention without a mask")
        return self.attend(attn, hidden_states, temb)

    def attend(self, attn: Any, x: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """Tokens x [B, N, C] -> [B, N, C]."""
        raise NotImplementedError


def only_unet(pipe: Any, what: str) -> Any:
    """The UNet of a pipeline.

    Raises:
        LeftOut: it has a transformer, which `what` does not know.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise LeftOut(f"{what} is made for UNets, not for {type(denoiser_of(pipe)).__name__}")
    return unet


def self_attention(denoiser: nn.Module) -> list[tuple[LayerSpec, Any]]:
    """The self-attention layers of a UNet or transformer."""
    return self_attention_layers(denoiser)


@contextmanager
def replaced_processors(unet: nn.Module, levels: tuple[int, ...], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the self-attention processors of these levels within the block by `make` of the original ones."""
    changed = [module for spec, module in self_attention(unet) if spec.level in levels]
    originals = [module.processor for module in changed]
    try:
        for module in changed:
            module.set_processor(make(module.processor))
        yield
    finally:
        for module, original in zip(changed, originals, strict=True):
            module.set_processor(original)


@contextmanager
def restored(unet: nn.Module, *attributes: str) -> Iterator[None]:
    """Puts back these attributes of all modules, as the modules themselves have them (and not their classes)."""
    before = {module: {a: module.__dict__[a] for a in attributes if a in module.__dict__} for module in unet.modules()}
    try:
        yield
    finally:
        for module, values in before.items():
            for attribute in attributes:
                module.__dict__.pop(attribute, None)
            module.__dict__.update(values)


def square_side(x: torch.Tensor) -> int:
    """Rows and columns of the grid of the tokens x [B, N, C].

    Raises:
        ValueError: not a square.
    """
    side = round(x.shape[1] ** 0.5)
    if side * side != x.shape[1]:
        raise ValueError(f"square pictures only: {x.shape[1]} tokens are not a square grid")
    return side
