"""The kinds of attention for layers of the backbone. A new one is a file beside this one, and a line here."""

from collections.abc import Mapping

from diffattn.models.agent import PooledAgentAttention
from diffattn.models.attention_layer import Attention
from diffattn.models.circulant import CirculantAttention
from diffattn.models.focused_linear import FocusedLinearAttention
from diffattn.models.inline import InLineAttention
from diffattn.models.mediator import MediatorAttention
from diffattn.models.mlla import MambaLikeMixer
from diffattn.models.softmax import SoftmaxAttention

ATTENTION: Mapping[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "agent": PooledAgentAttention,
    "mediator": MediatorAttention,
    "inline": InLineAttention,
    "focused_linear": FocusedLinearAttention,
    "mlla": MambaLikeMixer,
    "circulant": CirculantAttention,
}
"""Name in the configuration -> class of a layer's attention."""


def name_of(layer: object) -> str:
    """The name of a layer's attention in the configuration; its class name if it is not one of them."""
    return next((name for name, kind in ATTENTION.items() if type(layer) is kind), type(layer).__name__)
