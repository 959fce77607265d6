"""Agents beside tokens without a place on the grid."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import agent_attention, pool_tokens
from diffattn.methods import landmarks
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
    agents = pool_tokens(image, (6, 6), 4)
    kappa, share = options.get("scale_exponent", 0.3), options.get("shortcut", 0.075)
    expected = agent_attention(image, k, v, agents, scale_exponent=kappa, shortcut=0) + share * layout.on_grid(v)
    torch.testing.assert_close(layout.on_grid(out), expected)
    torch.testing.assert_close(layout.context(out), scaled_dot_product_attention(text, k, v))


@pytest.mark.parametrize(
    ("options", "tokens", "alone", "beside"),
    [
        ({}, 1024, 64, 64),
        ({}, 2048, 64, 128),
        ({}, 4096, 128, 256),
        ({}, 8100, 254, 256),
        ({}, 16384, 512, 512),
        ({"num_agents": 100}, 4096, 100, 100),
        ({"agent_ratio": 0.75}, 4096, 1024, 1024),
        ({"agents": "pool"}, 4096, 128, 128),
    ],
)
def test_joint_attention_has_more_landmarks_by_default(
    options: dict[str, Any], tokens: int, alone: int, beside: int
) -> None:
    method = AgentAttention(**options)
    assert (method.count(tokens), method.count(tokens, True)) == (alone, beside)


def test_landmarks_are_as_many_as_the_layout_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(landmarks, "calibrate", lambda tokens, *rest: seen.append(tokens.query_landmarks.shape[2]))
    attend = AgentAttention(min_tokens=0).build(LayerSpec("x", 0, 1, 8, context="last"))
    for context in (0, 5):
        q = torch.randn(1, 1, 4096 + context, 8)
        with torch.no_grad(), pytest.raises(TypeError):  # nothing is calibrated
            attend(q, q, q, LayerCall(None, (64, 64), layout=TokenLayout(((64, 64),), context)))
    assert seen == [121, 256]
