"""One file per paper. A new method is one file here and one line in `METHODS`."""

from collections.abc import Iterable

from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import SOFTMAX, AttentionMethod, LayerSpec
from diffattn.methods.inline import InLineAttention
from diffattn.methods.keys import DownsampledKeys
from diffattn.methods.mediator import MediatorAttention
from diffattn.methods.tiles import TiledAttention

METHODS: dict[str, type[AttentionMethod]] = {
    AgentAttention.name: AgentAttention,
    InLineAttention.name: InLineAttention,
    DownsampledKeys.name: DownsampledKeys,
    TiledAttention.name: TiledAttention,
    MediatorAttention.name: MediatorAttention,
}


def method_for(layers: Iterable[LayerSpec]) -> str:
    """The name of the default method for a model with these layers.

    Among the methods that suit the layers (`AttentionMethod.suits`), one for attention that the model learned comes
    before one that replaces softmax; among equals, and if no method suits, it is the first in `METHODS`.
    """
    layers = [layer for layer in layers if not layer.is_cross_attention]
    suitable = [method for method in METHODS.values() if method.suits(layers)]
    first = next(iter(METHODS.values()))
    return min(suitable, key=lambda method: method.replaces == SOFTMAX, default=first).name
