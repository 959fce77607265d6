"""The middle step of landmarks, profiled: what a call adds to the two attentions that it cannot do without; and whole
calls timed, as they are and compiled to one function each."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional import sample_tokens
from diffattn.functional.coasting import calibrate, coast
from diffattn.functional.landmark import Tokens
from diffattn.measure.launches import count_launches
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerSpec

from . import alone
from .item import Item, Setting

KIND = "middle"
HEAD_DIM = 64
SIDES = (32, 64, 128)
EXACT, ATTENTIONS, CALIBRATE, COAST = "exact", "the two attentions", "calibrating", "coasting"
MINUTES = 1.0


def items(setting: Setting) -> Iterator[Item]:
    for side in (16,) if setting.tiny else SIDES:
        name = f"middle-{side * side}"
        title = f"middle step of landmarks, {side * side:,} tokens, {alone.HEADS[HEAD_DIM]} heads of {HEAD_DIM}"
        yield Item(name, KIND, title, MINUTES, partial(measure, setting, side))


def measure(setting: Setting, side: int, deadline: float) -> dict[str, Any]:
    """Launches and their time of each part; the middle steps are differences to the two attentions."""
    layer = LayerSpec("layer", 0, alone.HEADS[HEAD_DIM], HEAD_DIM)
    q, k, v = alone.tokens(setting, layer, side)
    method = AgentAttention(min_tokens=0)
    number = method.count(side * side)
    asked, answering = (sample_tokens(x, (side, side), number) for x in (q, k))
    given = Tokens(q, k, v, asked, answering)
    with torch.no_grad():
        known = calibrate(given, method.damping)[2]
        gathered = scaled_dot_product_attention(asked, k, v)
    calls: dict[str, Callable[[], Any]] = {
        EXACT: partial(scaled_dot_product_attention, q, k, v),
        CALIBRATE: lambda: calibrate(given, method.damping),
        COAST: lambda: coast(given, method.damping, known),
    }
    parts: dict[str, Callable[[], Any]] = {
        "sampling": lambda: [sample_tokens(x, (side, side), number) for x in (q, k)],
        ATTENTIONS: lambda: (
            scaled_dot_product_attention(asked, k, v),
            scaled_dot_product_attention(q, answering, gathered),
        ),
    }
    compiled, left_out = _compiled({name: calls[name] for name in (CALIBRATE, COAST)}, setting)
    timings = alone.timed(setting, calls | compiled, side * side, deadline)
    return {
        "complete": len(timings.rounds) >= setting.rounds, "tokens": side * side, "head_dim": HEAD_DIM,
        "heads": layer.num_heads, "batch": alone.BATCH, "landmarks": asked.shape[2],
        "parts": _launched({**calls, **parts}, setting.device), "left_out": left_out, **timings.to_dict(),
    }  # fmt: skip


def _launched(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Launches of each call, and of the middle steps."""
    with torch.no_grad():
        found = {name: count_launches(call, device).to_dict() for name, call in calls.items()}
    base = found[ATTENTIONS]
    for name in (CALIBRATE, COAST):
        middle = {key: found[name][key] - base[key] for key in ("number", "seconds")}
        found[f"middle step, {name}"] = middle | {"what": base["what"]}
    return found


def _compiled(
    calls: Mapping[str, Callable[[], Any]], setting: Setting
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls compiled, and those that cannot be and why."""
    made: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    torch._dynamo.reset()
    for name, call in calls.items():
        compiled = torch.compile(call, dynamic=False, backend=setting.backend)
        try:
            with torch.no_grad():
                compiled()
        except Exception as error:  # whatever a compiler of this version may raise
            left_out[f"{name}, compiled"] = f"{type(error).__name__}: {error}"[:500]
        else:
            made[f"{name}, compiled"] = compiled
    return made, left_out
