"""Shared by the architectures of diffusers: the description of a layer, and its plug."""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from diffattn.architectures.base import Replaced
from diffattn.architectures.layer_plug import LayerPlug
from diffattn.architectures.plug import STAND_INS, genuine, plug_in, reason_unplugged
from diffattn.methods.base import LayerSpec


def reason_exact(module: nn.Module) -> str | None:
    """Why a layer must keep its processor, or None."""
    if getattr(module, "added_kv_proj_dim", None) is not None and isinstance(module, Attention):
        return "added key and value projections"
    return reason_unplugged(getattr(module, "processor", None))


def spec_of(name: str, module: nn.Module, level: int) -> LayerSpec:
    """What is known about a layer, whatever its attention class."""
    heads = int(getattr(module, "heads", None) or getattr(module, "num_heads", 1))
    return LayerSpec(
        name=name,
        level=level,
        num_heads=heads,
        head_dim=int(getattr(module, "inner_dim", 0)) // heads,
        is_cross_attention=not isinstance(module, Attention) or getattr(module, "is_cross_attention", False),
        upcast=bool(getattr(module, "upcast_attention", False) or getattr(module, "upcast_softmax", False)),
    )


class Slot:
    """A child module without parameters that attends, presented as a layer whose processor it is."""

    def __init__(self, parent: nn.Module, name: str) -> None:
        self.parent, self.name = parent, name

    @property
    def processor(self) -> nn.Module:
        return getattr(self.parent, self.name)

    def set_processor(self, processor: nn.Module) -> None:
        setattr(self.parent, self.name, processor)


def install(module: Any, processor: Any) -> None:
    """Give a layer a processor, whether or not it has `set_processor` (Mochi's layers have none)."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def replaced(*, original: Any, **parts: Any) -> Replaced:
    """The plug of one layer, and the plugged processor that the layer is given; see `MethodProcessor`."""
    plug = LayerPlug(original=genuine(original), **parts)
    plug.honours_scale = type(plug.original) in STAND_INS
    return Replaced(plug, plug_in(plug))
