"""One file per paper. A new method is one file here and one line in `METHODS`."""

from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import AttentionMethod
from diffattn.methods.inline import InLineAttention
from diffattn.methods.mediator import MediatorAttention

METHODS: dict[str, type[AttentionMethod]] = {
    AgentAttention.name: AgentAttention,
    InLineAttention.name: InLineAttention,
    MediatorAttention.name: MediatorAttention,
}
