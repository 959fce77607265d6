"""Pooled agents beside tokens without a place on the grid."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import agent_attention, pool_tokens
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerCall, LayerSpec, TokenLayout


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale_exponent": 1.0, "shortcut": 0.0}, {"shortcut": 0.5}])
def test_pooled_agents_gather_with_the_text_and_answer_it_exactly(first: bool, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    layout = TokenLayout(((6, 6),), num_context=3, context_first=first)
    q, k, v = torch.randn(3, 2, 4, 39, 8)
    method = AgentAttention(num_agents=4, agents="pool", min_tokens=0, **options)  # type: ignore[arg-type]
    spec = LayerSpec("x", 0, 4, 8, context="first" if first else "last")
    out = method.build(spec)(q, k, v, LayerCall(None, (6, 6), layout=layout))
    image, text = layout.split(q)
    agents = torch.cat((pool_tokens(image, (6, 6), 4), text), dim=2)
    kappa, share = options.get("scale_exponent", 0.3), options.get("shortcut", 0.075)
    expected = agent_attention(image, k, v, agents, scale_exponent=kappa, shortcut=0) + share * layout.on_grid(v)
    torch.testing.assert_close(layout.on_grid(out), expected)
    torch.testing.assert_close(layout.context(out), scaled_dot_product_attention(text, k, v))
