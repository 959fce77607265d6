"""What the methods for softmax attention share: their limits, masks, precision, the tuner, and compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from support.methods import LAYER, layer_call, qkv
from support.tensors import random
from torch import Tensor

import diffattn
from diffattn.functional import downsampled_attention, tiled_attention
from diffattn.methods import METHODS
from diffattn.methods.base import LayerCall, LayerSpec, TokenLayout
from diffattn.methods.keys import DownsampledKeys
from diffattn.methods.limited import LimitedMethod
from diffattn.methods.tiles import TiledAttention
from diffattn.tuning.settings import settings_of

LIMITED = {name: kind for name, kind in METHODS.items() if issubclass(kind, LimitedMethod)}
FEWER_KEYS: dict[str, tuple[LimitedMethod, Callable[..., Tensor]]] = {
    "keys": (DownsampledKeys(min_tokens=0), lambda q, k, v: downsampled_attention(q, k, v, (6, 6), 2)),
    "tiles": (TiledAttention(min_tokens=0), lambda q, k, v: tiled_attention(q, k, v, (6, 6), (2, 2))),
}
"""Methods that are exact attention over fewer keys, and their functions on a grid of 6x6."""


def test_all_methods_without_training_have_limits() -> None:
    assert list(LIMITED) == ["agent", "inline", "keys", "tiles"]


@pytest.mark.parametrize("kind", LIMITED.values(), ids=LIMITED)
@pytest.mark.parametrize(("options", "message"), [
    ({"min_tokens": -1}, "min_tokens must be a whole number, 0 or more, or None, got -1"),
    ({"min_tokens": True}, "min_tokens must be a whole number, 0 or more, or None, got True"),
    ({"max_level": 0.5}, "max_level must be a whole number, 0 or more, or None, got 0.5"),
    ({"tokens": 3}, "unknown option tokens of method '{}'; allowed: .*min_tokens, max_level"),
])  # fmt: skip
def test_limits_that_cannot_be_are_refused(kind: type[LimitedMethod], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.format(kind.name)):
        kind.from_options(options)


@pytest.mark.parametrize("kind", LIMITED.values(), ids=LIMITED)
def test_layers_beyond_the_limits_run_exact(kind: type[LimitedMethod]) -> None:
    method = kind.from_options({"min_tokens": 512, "max_level": 0})
    assert method.supports(LAYER)
    assert not method.supports(LayerSpec("cross", 0, 4, 64, is_cross_attention=True))
    assert not method.supports(LayerSpec("deep", 1, 4, 64))
    assert kind().supports(LayerSpec("deep", 1, 4, 64))
    assert method.reason_slower(512, "cpu") is None
    assert method.reason_slower(511, "cpu") == "511 tokens: exact attention is faster below 512"
    assert kind.from_options({"min_tokens": 0}).reason_slower(4, "cpu") is None


@pytest.mark.parametrize("kind", [kind for name, kind in LIMITED.items() if name != "agent"])  # which has a table
def test_without_limits_few_tokens_are_presumably_faster_exact(kind: type[LimitedMethod]) -> None:
    assert kind().reason_slower(1024, "cpu") is None
    assert kind().reason_slower(1023, "cpu") == "1023 tokens: exact attention is faster below 1024"


@pytest.mark.parametrize("kind", [kind for name, kind in LIMITED.items() if name != "inline"])  # which has no masks
def test_masks_that_differ_between_queries_run_exact(kind: type[LimitedMethod]) -> None:
    assert kind().reason_call(LAYER, 1024, "cpu", 1) is None
    assert kind().reason_call(LAYER, 1024, "cpu", 1024) == "masked: the mask differs between queries"


@pytest.mark.parametrize("kind", LIMITED.values(), ids=LIMITED)
def test_the_tuner_may_choose_it(kind: type[LimitedMethod]) -> None:
    names = [s.method.name for s in settings_of()]
    assert names.count(kind.name) == len(kind.candidates()) > 0


@pytest.mark.parametrize("name", FEWER_KEYS)
def test_a_batch_is_its_samples(name: str) -> None:
    q, k, v = qkv(39, batch=3)
    layout = TokenLayout(((5, 7),), num_context=4)
    mask = torch.where(random(3, 1, 1, 39, seed=5) > 0.5, -10_000.0, 0.0)
    attend = FEWER_KEYS[name][0].build(LAYER)
    together = attend(q, k, v, layer_call(layout, mask=mask))
    for i in range(3):
        alone = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], layer_call(layout, mask=mask[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("name", FEWER_KEYS)
def test_half_precision_where_logits_overflow(name: str) -> None:
    method, function = FEWER_KEYS[name]
    layer = LayerSpec("layer", level=0, num_heads=2, head_dim=8, upcast=True)
    q, k, v = (x * f for x, f in zip(qkv(36), (400, 400, 1), strict=True))
    q, k, v = (x.half() for x in (q, k, v))
    assert (q.float() @ k.float().mT).amax() > torch.finfo(torch.float16).max
    out = method.build(layer)(q, k, v, LayerCall(x=None, grid=(6, 6)))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), function(q.double(), k.double(), v.double()), atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", FEWER_KEYS)
def test_a_patched_model_compiles_whole_and_gives_the_same(name: str, make_pipeline: Any) -> None:
    unet = make_pipeline("sd").unet
    x, context = random(1, 4, 16, 14), random(1, 7, tiny.WIDTH)
    with torch.no_grad():
        with diffattn.patch(unet, name, min_tokens=0):
            expected = unet(x, 500, context).sample
        compiled: Any = torch.compile(unet, backend="eager", fullgraph=True)
        with diffattn.patch(compiled, name, min_tokens=0) as handle:
            out = compiled(x, 500, context).sample
            assert handle.report().calls_accelerated == 7
    torch.testing.assert_close(out, expected)
