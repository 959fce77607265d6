"""Agents beside tokens without a place on the grid."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import agent_attention, pool_tokens
from diffattn.functional.landmark import Tokens
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


def test_landmarks_are_as_many_and_weigh_as_much_as_the_layout_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tokens] = []
    monkeypatch.setattr(landmarks, "calibrate", lambda tokens, *rest: seen.append(tokens))
    attend = AgentAttention(min_tokens=0).build(LayerSpec("x", 0, 1, 8, context="last"))
    picture, reference = (64, 64), (32, 32)
    mask = torch.ones(1, 1, 1, 4101, dtype=torch.bool)
    mask[..., -2:] = False
    for grids, context, masked in (((picture,), 0, None), ((picture,), 5, mask), ((picture, reference), 5, None)):
        layout = TokenLayout(grids, context)
        q = torch.randn(1, 1, layout.num_tokens + context, 8)
        with torch.no_grad(), pytest.raises(TypeError):  # nothing is calibrated
            attend(q, q, q, LayerCall(None, picture, mask=masked, layout=layout))
    plain, beside, two = seen
    assert [x.query_landmarks.shape[2] for x in seen] == [11**2, 16**2, 14**2 + 7**2]
    assert plain.landmark_mask is None
    weights = torch.cat((torch.full((256,), 4096 / 256), torch.tensor([1.0, 1, 1, 0, 0])))
    assert beside.landmark_mask is not None
    torch.testing.assert_close(beside.landmark_mask.exp(), weights[None, None, None])
    assert two.landmark_mask is not None
    sizes = two.landmark_mask.flatten().exp()
    torch.testing.assert_close(sizes[-5:], torch.ones(5))
    torch.testing.assert_close(sizes[:-5].sum(), torch.tensor(5120.0))  # together they stand for every token
