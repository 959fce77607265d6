"""Agent attention as a function of tensors: the published numbers, its formula, and what it must refuse."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import Case, cases
from support.tensors import join, random, split
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from diffattn.functional import (
    agent_attention,
    match_tokens,
    merge_tokens,
    pool_tokens,
    unmerge_tokens,
)
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerCall, LayerSpec

LAYER = LayerSpec("layer", level=0, num_heads=2, head_dim=8)


def formula(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, kappa: float, shortcut: float, mask: Tensor) -> Tensor:
    """Equations 3 to 5 with explicit matrices."""
    scale = q.shape[-1] ** -0.5
    gathered = (agents @ k.mT * scale + mask).softmax(-1) @ v
    out = (q @ agents.mT * scale**kappa).softmax(-1) @ gathered
    return out + shortcut * v if shortcut else out


# The published numbers.


@cases("agent_attn_")
def test_attention_matches_the_published_implementation(case: Case) -> None:
    p, w = case.params, case.tensors
    q, k, v = (split(linear(case["in.x"], w[f"w.to_{n}.weight"]), p["heads"]) for n in "qkv")
    agents = split(linear(case["in.agent"], w["w.to_q.weight"]), p["heads"])
    if p["agent_path_taken"]:
        out = agent_attention(q, k, v, agents, scale_exponent=p["k_scale2"], shortcut=p["k_shortcut"])
    else:
        out = scaled_dot_product_attention(q, k, v)
    case.assert_close(linear(join(out), w["w.to_out.0.weight"], w["w.to_out.0.bias"]), "out.y")


@cases("agent_attn_pooled4x4")
def test_pooled_queries_are_the_queries_of_pooled_tokens(case: Case) -> None:
    p, w = case.params, case.tensors
    q, k, v = (split(linear(case["in.x"], w[f"w.to_{n}.weight"]), p["heads"]) for n in "qkv")
    agents = pool_tokens(q, (p["h"], p["w"]), p["A"])
    torch.testing.assert_close(agents, split(linear(case["in.agent"], w["w.to_q.weight"]), p["heads"]))
    out = agent_attention(q, k, v, agents)
    case.assert_close(linear(join(out), w["w.to_out.0.weight"], w["w.to_out.0.bias"]), "out.y")


@cases("agent_attn_gate_fallback")
def test_layers_with_half_as_many_agents_as_tokens_are_declined(case: Case) -> None:
    tokens, agents = case.params["N"], case.params["A"]
    assert 2 * agents >= tokens
    method = AgentAttention(num_agents=agents, agent_ratio=None, min_tokens=0)
    assert "32 agents for 64 tokens" in str(method.reason_call(LAYER, tokens, "cpu", 0))
    fewer = AgentAttention(num_agents=agents - 1, agent_ratio=None, min_tokens=0)
    assert fewer.reason_call(LAYER, tokens, "cpu", 0) is None


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({}, 1024, 64), ({}, 16384, 512), ({"num_agents": 256}, 16384, 256), ({"num_agents": 4}, 1024, 4),
        ({"agent_ratio": 0.75}, 1024, 256), ({"num_agents": 300, "agent_ratio": 0.75}, 1024, 300),
        ({"num_agents": 16, "agent_ratio": 0.75}, 1024, 256), ({"num_agents": 9, "agent_ratio": None}, 16384, 9),
    ],
)  # fmt: skip
def test_how_many_agents(options: dict[str, Any], tokens: int, expected: int) -> None:
    assert AgentAttention(**options).count(tokens) == expected


def _self_attention(case: Case, x: Tensor, merged_agents: Tensor | None) -> Tensor:
    w, heads = case.tensors, case.params["heads"]
    q, k, v = (split(linear(x, w[f"w.attn1.to_{n}.weight"]), heads) for n in "qkv")
    if merged_agents is None:
        out = scaled_dot_product_attention(q, k, v)
    else:
        agents = split(linear(merged_agents, w["w.attn1.to_q.weight"]), heads)
        defaults = case.params["apply_patch_defaults"]
        out = agent_attention(q, k, v, agents, scale_exponent=defaults["k_scale2"], shortcut=defaults["k_shortcut"])
    return linear(join(out), w["w.attn1.to_out.0.weight"], w["w.attn1.to_out.0.bias"])


@cases("agentsd_block_")
def test_a_transformer_block_matches_the_published_implementation(case: Case) -> None:
    p, w, x, context = case.params, case.tensors, case["in.x"], case["in.context"]

    def norm(x: Tensor, i: int) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"w.norm{i}.weight"], w[f"w.norm{i}.bias"])

    options = p["apply_patch"]
    matching = match_tokens(x, (p["h"], p["w"]), (options["sy"], options["sx"]))  # on the input before its norm
    merged = int(p["N"] * options["ratio"])
    left_out = min(int(p["N"] * options["agent_ratio"]), matching.max_merged)
    feature = merge_tokens(norm(x, 1), matching, merged)
    case.assert_close(feature, "out.feature")
    agents = merge_tokens(norm(x, 1), matching, left_out)
    takes_agents = 2 * agents.shape[1] < feature.shape[1]
    assert takes_agents == p["agent_path_taken"]
    if takes_agents:
        case.assert_close(agents, "out.agent")
    attended = _self_attention(case, feature, agents if takes_agents else None)
    x = x + unmerge_tokens(attended, matching, merged)
    case.assert_close(x, "out.after_attn1")

    q = split(linear(norm(x, 2), w["w.attn2.to_q.weight"]), p["heads"])
    k, v = (split(linear(context, w[f"w.attn2.to_{n}.weight"]), p["heads"]) for n in "kv")
    crossed = join(scaled_dot_product_attention(q, k, v))
    x = x + linear(crossed, w["w.attn2.to_out.0.weight"], w["w.attn2.to_out.0.bias"])
    value, gate = linear(norm(x, 3), w["w.ff.net.0.proj.weight"], w["w.ff.net.0.proj.bias"]).chunk(2, dim=-1)
    x = x + linear(value * gelu(gate), w["w.ff.net.2.weight"], w["w.ff.net.2.bias"])
    case.assert_close(x, "out.y")


# The formula.


@given(
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    num_agents=st.integers(1, 12),
    dim=st.sampled_from([1, 4, 8, 40]),
    kappa=st.floats(0, 1),
    shortcut=st.floats(-1, 1),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_formula_with_explicit_matrices(
    heads: int, queries: int, keys: int, num_agents: int, dim: int, kappa: float, shortcut: float, masked: bool
) -> None:
    q, agents = (random(2, heads, n, dim, seed=n, dtype=torch.float64) for n in (queries, num_agents))
    k, v = (random(2, heads, keys, dim, seed=s, dtype=torch.float64) for s in (91, 92))
    shortcut = shortcut if queries == keys else 0.0
    mask = (
        torch.where(random(2, 1, 1, keys, seed=5) > 0.3, -10000.0, 0.0).double() if masked else torch.zeros(1).double()
    )
    out = agent_attention(q, k, v, agents, scale_exponent=kappa, shortcut=shortcut, key_mask=mask if masked else None)
    torch.testing.assert_close(out, formula(q, k, v, agents, kappa, shortcut, mask), rtol=1e-9, atol=1e-9)


def test_a_masked_key_has_no_say() -> None:
    q, k, v, agents = (random(1, 2, n, 8, seed=n) for n in (5, 7, 8, 3))
    v = v[:, :, :7]
    mask = torch.zeros(1, 1, 1, 7)
    mask[..., 4] = -torch.inf
    keep = [0, 1, 2, 3, 5, 6]
    masked = agent_attention(q, k, v, agents, shortcut=0, key_mask=mask)
    torch.testing.assert_close(masked, agent_attention(q, k[:, :, keep], v[:, :, keep], agents, shortcut=0))


def test_output_lies_between_the_values() -> None:
    q, k, v, agents = (random(2, 2, 30, 8, seed=s) for s in range(4))
    out = agent_attention(q, k, v, agents, shortcut=0)
    assert (out <= v.amax(2, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-5).all()
    constant = torch.full_like(v, 2.0)
    torch.testing.assert_close(agent_attention(q, k, constant, agents, shortcut=0.5), torch.full_like(v, 3.0))


def test_sharp_agents_that_are_all_the_queries_hand_back_each_key_its_own_value() -> None:
    basis = 100 * torch.eye(16)[None, None]  # [1, 1, N, D]: every query finds its own agent, every agent its own key
    v = random(1, 1, 16, 16)
    torch.testing.assert_close(agent_attention(basis, basis, v, basis, scale_exponent=1, shortcut=0), v)


def test_order_of_the_agents_does_not_matter() -> None:
    q, k, v, agents = (random(1, 2, n, 8, seed=s) for s, n in enumerate((20, 20, 20, 6)))
    torch.testing.assert_close(agent_attention(q, k, v, agents), agent_attention(q, k, v, agents.flip(2)))


def test_a_smaller_exponent_sharpens_the_broadcast() -> None:
    q, agents = random(1, 1, 12, 64), random(1, 1, 6, 64, seed=1)
    k, v = agents * 50, torch.eye(6, 64)[None, None]  # every agent gathers its own key, so the output is the broadcast
    soft, sharp = (agent_attention(q, k, v, agents, scale_exponent=e, shortcut=0).amax(-1) for e in (1.0, 0.3))
    assert (sharp > soft).all()


# What it refuses, gradients and half precision.


def test_a_shortcut_between_different_numbers_of_queries_and_values_is_refused() -> None:
    q, k, v, agents = (random(1, 1, n, 4) for n in (6, 8, 8, 2))
    with pytest.raises(ValueError, match=r"shortcut=0.075.*6 and 8"):
        agent_attention(q, k, v, agents)
    assert agent_attention(q, k, v, agents, shortcut=0).shape == (1, 1, 6, 4)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (random(1, 2, 12, 4, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return agent_attention(q, k, v, pool_tokens(q, (4, 3), 4))

    assert torch.autograd.gradcheck(attention, (q, k, v))


METHODS = {
    "pool": AgentAttention(num_agents=4, agent_ratio=None, min_tokens=0, upcast=True),
    "merge": AgentAttention(agents="merge", num_agents=4, agent_ratio=None, merge_stride=4, min_tokens=0, upcast=True),
}


@pytest.mark.parametrize(("kind", "dtype"), list(product(METHODS, [torch.float16, torch.bfloat16])))
def test_upcast_keeps_large_logits_finite_and_right_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (random(2, 2, 64, 64, seed=s) * f for s, f in enumerate((60, 60, 1)))
    q, k, v = (x.to(dtype) for x in (q + 60, k + 60, v))  # logits before scaling reach hundreds of thousands
    assert (q.double() @ k.double().mT).amax() > torch.finfo(torch.float16).max
    call = LayerCall(x=random(2, 64, 128, seed=9), grid=(8, 8))
    attention = METHODS[kind].build(LAYER)
    out, exact = attention(q, k, v, call), attention(q.double(), k.double(), v.double(), call)
    assert out.dtype == dtype
    assert out.isfinite().all()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact.double(), atol=4 * step, rtol=4 * step)


@pytest.mark.parametrize(("asks", "dtype", "works_in"), [
    (True, torch.float16, torch.float32),
    (True, torch.bfloat16, torch.bfloat16),
    (False, torch.float16, torch.float16),
])  # fmt: skip
def test_fp32_logits_where_the_layer_asks_for_them_in_fp16(
    asks: bool, dtype: torch.dtype, works_in: torch.dtype
) -> None:
    layer = LayerSpec("layer", level=0, num_heads=2, head_dim=8, upcast=asks)
    q, k, v = (random(1, 2, 64, 8, seed=s).to(dtype) for s in range(3))
    call = LayerCall(x=random(1, 64, 16), grid=(8, 8))
    out = AgentAttention(agents="pool", num_agents=4, agent_ratio=None, min_tokens=0).build(layer)(q, k, v, call)
    q, k, v = (x.to(works_in) for x in (q, k, v))
    assert torch.equal(out, agent_attention(q, k, v, pool_tokens(q, (8, 8), 4)).to(dtype))
