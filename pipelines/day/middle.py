"""The middle step of landmarks, profiled: what a call adds to the two attentions that it cannot do without."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import sample_tokens
from diffattn.functional.coasting import Tokens, calibrate, coast
from diffattn.measure.launches import count_launches
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerSpec

from . import alone
from .item import Item, Setting

KIND = "middle"
HEAD_DIM = 64
SIDES = (32, 64, 128)
ATTENTIONS, CALIBRATE, COAST = "the two attentions", "calibrating", "coasting"


def items(setting: Setting) -> Iterator[Item]:
    for side in (16,) if setting.tiny else SIDES:
        name = f"middle-{side * side}"
        title = f"middle step of landmarks, {side * side:,} tokens, {alone.HEADS[HEAD_DIM]} heads of {HEAD_DIM}"
        yield Item(name, KIND, title, 0.2, partial(measure, setting, side))


def measure(setting: Setting, side: int, deadline: float) -> dict[str, Any]:
    """Launches and their time of each part; the middle steps are differences to the two attentions."""
    layer = LayerSpec("layer", 0, alone.HEADS[HEAD_DIM], HEAD_DIM)
    q, k, v = alone.tokens(setting, layer, side)
    method = AgentAttention(min_tokens=0)
    number = method.count(side * side)
    asked, answering = (sample_tokens(x, (side, side), number) for x in (q, k))
    given = Tokens(q, k, v, asked, answering)
    calls: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        known = calibrate(given, method.damping)[2]
        gathered = scaled_dot_product_attention(asked, k, v)
        calls["exact"] = partial(scaled_dot_product_attention, q, k, v)
        calls[ATTENTIONS] = lambda: (
            scaled_dot_product_attention(asked, k, v),
            scaled_dot_product_attention(q, answering, gathered),
        )
        calls["sampling"] = lambda: [sample_tokens(x, (side, side), number) for x in (q, k)]
        calls[CALIBRATE] = lambda: calibrate(given, method.damping)
        calls[COAST] = lambda: coast(given, method.damping, known)
        parts = {name: count_launches(call, setting.device).to_dict() for name, call in calls.items()}
    base = parts[ATTENTIONS]
    for name in (CALIBRATE, COAST):
        middle = {key: parts[name][key] - base[key] for key in ("number", "seconds")}
        parts[f"middle step, {name}"] = middle | {"what": base["what"]}
    return {
        "complete": True, "tokens": side * side, "head_dim": HEAD_DIM, "heads": layer.num_heads,
        "batch": alone.BATCH, "landmarks": asked.shape[2], "parts": parts,
    }  # fmt: skip
