"""Attention alone: q, k, v of one layer, exact with every dense backend there is, and every approximation.

Shapes: B batch, H heads, N = side² tokens, D channels per head.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention

from diffattn.measure.interleave import Timings, interleave
from diffattn.methods import METHODS
from diffattn.methods.base import AttentionFn, LayerCall, LayerSpec

from .item import Item, Setting

KIND = "attention"
BATCH = 2
HEADS = {40: 8, 64: 10, 128: 24}
"""Channels per head -> heads: as in Stable Diffusion 1.5's and SDXL's highest resolution with attention, and FLUX."""

SIDES = {32: 0.2, 48: 0.2, 64: 0.3, 96: 0.4, 128: 0.8}
"""Rows, and columns, of the grids: 1,024 to 16,384 tokens -> minutes."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EXACT = "exact, "
CHOSEN = "exact, as torch chooses"

APPROXIMATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "landmarks, calibrating": ("agent", {"calibrate_every": 1}),
    "landmarks, coasting": ("agent", {"calibrate_every": 10**9}),
    "pooled agents": ("agent", {"agents": "pool"}),
    "keys": ("keys", {}),
}
"""Variant -> method and options."""

CELL = 8  # tokens between two of noise, along each axis

TIMED_TOKENS = 2**14
"""Of all calls together that make one timing: calls on few tokens are too short for the clock."""


def items(setting: Setting) -> Iterator[Item]:
    """The largest head size last: it takes longest."""
    sides = {12: 0.1, 16: 0.1} if setting.tiny else SIDES
    for head_dim, heads in HEADS.items():
        for side, minutes in sides.items():
            tokens = side * side
            yield Item(
                f"attention-{head_dim}-{tokens}",
                KIND,
                f"attention alone, {tokens:,} tokens, {heads} heads of {head_dim}, batch {BATCH}",
                minutes,
                partial(measure, setting, side, head_dim),
            )


def measure(setting: Setting, side: int, head_dim: int, deadline: float) -> dict[str, Any]:
    """Seconds of a call of every variant, and ratios to the fastest exact one."""
    layer = LayerSpec("layer", 0, HEADS[head_dim], head_dim)
    q, k, v = tokens(setting, layer, side)
    calls, left_out = _exact(q, k, v)
    exact_heads: dict[str, int] = {}
    for name, (method, options) in APPROXIMATIONS.items():
        try:
            attend = _function(method, options, layer, side * side, setting.device.type)
        except ValueError as error:
            left_out[name] = str(error)
        else:
            call = partial(_call, attend, q, k, v, (side, side), dict[str, Any]())
            calls[name] = call
            with torch.no_grad():
                exact_heads[name] = call().exact_heads
    found = timed(setting, calls, side * side, deadline)
    fastest = fastest_exact(found)
    return {
        "complete": len(found.rounds) >= setting.rounds,
        "tokens": side * side, "head_dim": head_dim, "heads": layer.num_heads, "batch": BATCH,
        "fastest_exact": fastest, "exact_heads": exact_heads, "left_out": left_out,
        **replace(found, reference=fastest).to_dict(),
    }  # fmt: skip


def timed(setting: Setting, calls: Mapping[str, Callable[[], Any]], num_tokens: int, deadline: float) -> Timings:
    """Seconds of one call of each, in turns; every timing is of several calls where there are few tokens."""
    repeats = 2 if setting.tiny else max(1, TIMED_TOKENS // num_tokens)
    repeated = {name: partial(_repeat, call, repeats) for name, call in calls.items()}
    with torch.no_grad():
        found = interleave(repeated, setting.rounds, 2, setting.device, deadline=deadline)
    rounds = tuple({name: seconds / repeats for name, seconds in r.items()} for r in found.rounds)
    return replace(found, rounds=rounds)


def fastest_exact(timings: Timings) -> str:
    """The backend with the smallest median; torch's choice where none could be chosen."""
    named = [name for name in timings.rounds[0] if name.startswith(EXACT) and name != CHOSEN]
    return min(named, key=lambda name: timings.seconds(name).median, default=CHOSEN)


def tokens(setting: Setting, layer: LayerSpec, side: int) -> list[Tensor]:
    """q, k and v [B, H, N, D] that are smooth over the grid, as those of pictures are. With noise, checked heads would
    fall back to exact attention, since no landmark represents its neighbours."""
    generator = torch.Generator(setting.device).manual_seed(0)
    coarse = max(2, side // CELL)
    shape = (BATCH * layer.num_heads, layer.head_dim, coarse, coarse)
    found = []
    for _ in range(3):
        noise = torch.randn(shape, generator=generator, device=setting.device)
        smooth = interpolate(noise, size=(side, side), mode="bilinear", align_corners=True)
        x = smooth.flatten(2).mT.unflatten(0, (BATCH, layer.num_heads))
        found.append(x.to(setting.dtype).contiguous())
    return found


def _exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Exact attention by every backend that can run here, and why the others cannot."""
    calls: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        call = partial(_with_backend, backend, q, k, v)
        try:
            with _quiet():
                call()
        except RuntimeError as error:
            left_out[EXACT + name] = str(error).partition("\n")[0]
        else:
            calls[EXACT + name] = call
    calls[CHOSEN] = partial(scaled_dot_product_attention, q, k, v)
    return calls, left_out


def _with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about a backend that cannot run; the result says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _function(method: str, options: Mapping[str, Any], layer: LayerSpec, tokens: int, device: str) -> AttentionFn:
    """A method's function for the layer, whether or not it pays there.

    Raises:
        ValueError: there is no such method, or it cannot approximate so few tokens.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}")
    made = METHODS[method].from_options({**options, "min_tokens": 0})
    if reason := made.reason_call(layer, tokens, device, 0):
        raise ValueError(reason)
    return made.build(layer)


def _call(
    attend: AttentionFn, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], memory: dict[str, Any]
) -> LayerCall:
    call = LayerCall(None, grid, memory=memory)
    attend(q, k, v, call)
    return call


def _repeat(call: Callable[[], Any], number: int) -> None:
    for _ in range(number):
        call()
