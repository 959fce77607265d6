"""InLine attention without training: which heads it takes, what it counts, what it refuses."""

import math
from typing import Any

import pytest
import torch
from support import tiny
from support.tensors import random
from support.tiny_dit import tiny_dit
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn.functional import inline_attention
from diffattn.functional.inline import inline_attention_and_error
from diffattn.methods.base import LayerCall, LayerSpec
from diffattn.methods.inline import InLineAttention

SPREADS = (0.1, 0.25, 0.5, 2.0)
LAYER = LayerSpec("layer", level=0, num_heads=4, head_dim=64)


def heads_by_spread(tokens: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """A head for each standard deviation of the logits, flat to sharp [1, 4, N, 64]; values have a mean of 1."""
    q, k, v = (random(1, len(SPREADS), tokens, 64, seed=s) for s in range(3))
    return q * torch.tensor(SPREADS)[:, None, None], k, v + 1


def call(**options: Any) -> LayerCall:
    return LayerCall(x=random(1, 4, 8), grid=(32, 64), **options)


def test_flat_heads_run_linear_and_sharp_heads_exact_and_are_counted() -> None:
    q, k, v = heads_by_spread()
    exact, linear, asked = scaled_dot_product_attention(q, k, v), inline_attention(q, k, v), call()
    out = InLineAttention().build(LAYER)(q, k, v, asked)
    assert asked.exact_heads == 1
    assert torch.equal(out[:, :3], linear[:, :3])
    torch.testing.assert_close(out[:, 3], exact[:, 3])
    missed = (out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    assert missed.max() < 0.1


def test_the_error_on_eight_queries_is_that_of_all() -> None:
    q, k, v = heads_by_spread()
    out, error = inline_attention_and_error(q, k, v)
    exact = scaled_dot_product_attention(q, k, v)
    true = (out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    assert (error / true - 1).abs().max() < 0.6
    assert error.sort().indices.tolist() == [[0, 1, 2, 3]]


def test_samples_are_judged_one_by_one() -> None:
    q, k, v = heads_by_spread(256)
    batch = (torch.cat((q, 30 * q)), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
    asked = call()
    out = InLineAttention().build(LAYER)(*batch, asked)
    alone = InLineAttention().build(LAYER)(q, k, v, call())
    torch.testing.assert_close(out[:1], alone)
    assert asked.exact_heads > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_logits_overflow_falls_back(dtype: torch.dtype) -> None:
    layer = LayerSpec("layer", level=0, num_heads=4, head_dim=64, upcast=True)
    q, k, v = (x.to(dtype) for x in (1000 * random(1, 4, 64, 64), random(1, 4, 64, 64, seed=1), random(1, 4, 64, 64)))
    asked = call()
    out = InLineAttention().build(layer)(q, k, v, asked)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert asked.exact_heads == 4


def test_unchecked_it_is_the_core_alone() -> None:
    q, k, v = heads_by_spread(128)
    asked = call()
    assert torch.equal(InLineAttention(max_head_error=math.inf).build(LAYER)(q, k, v, asked), inline_attention(q, k, v))
    assert asked.exact_heads == 0


def test_compiled_code_gives_the_same_heads() -> None:
    q, k, v = heads_by_spread(512)
    attention, asked = InLineAttention().build(LAYER), call()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, asked)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_masked_calls_run_exact() -> None:
    method = InLineAttention()
    assert method.reason_call(LAYER, 1024, "cpu", 0) is None
    assert "masked" in str(method.reason_call(LAYER, 1024, "cpu", 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"max_head_error": 0}, "max_head_error must be a number above 0, inf included, got 0"),
    ({"max_head_error": math.nan}, "max_head_error must be a number above 0"),
    ({"max_head_error": True}, "got True"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InLineAttention.from_options(options)


def test_layers_of_another_kind_are_left_alone_by_name() -> None:
    model = tiny_dit(attention=["softmax", "mlla", "circulant"], num_layers=3)
    found = {layer.name: layer.note for layer in diffattn.patch(model, "inline", min_tokens=0).report().layers}
    assert found["blocks.0.attn"] == ""
    assert "attention class MambaLikeMixer" in found["blocks.1.attn"]
    assert "circulant attention, which method 'inline' does not replace" in found["blocks.2.attn"]


def test_the_report_says_how_many_heads_ran_exact(make_pipeline: Any) -> None:
    pipe = make_pipeline("sd")
    handle = diffattn.patch(pipe, "inline", min_tokens=0, max_head_error=1e-9)
    accelerated = tiny.run(pipe)
    report = handle.report()
    assert report.calls_accelerated > 0
    assert all(layer.exact_heads > 0 for layer in report.layers if layer.accelerated)
    assert "heads per accelerated call fell back to exact attention" in str(report)
    handle.remove()
    torch.testing.assert_close(accelerated, tiny.run(pipe), atol=1e-3, rtol=1e-3)
