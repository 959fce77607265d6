"""The variants of the benchmark: each changes a denoiser within a `with` block, and then restores it."""

import warnings
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from diffattn.architectures.denoisers import denoisers_of, self_attention_layers, uncompiled
from diffattn.benchmarks.floor import OwnValues
from diffattn.methods.agent import AgentAttention
from diffattn.methods.keys import DownsampledKeys
from diffattn.methods.tiles import TiledAttention
from diffattn.patching.hook import DiffAttnWarning
from diffattn.patching.patch import Patch, patch
from diffattn.patching.plan import DEFAULT_PRESET, Plan
from diffattn.schedules import constant

SDPA, TOME, FLOOR = "sdpa", "tome", "floor"
PRESETS = tuple(AgentAttention.presets)
OTHER_METHODS = (DownsampledKeys.name, TiledAttention.name)
VARIANTS = (SDPA, *PRESETS, TOME, *OTHER_METHODS, FLOOR)
"""The presets are those of agents; other methods run with their own preset "balanced"."""

TOME_RATIO = 0.5

Coverage = Callable[[], int]
"""The number of self-attention layers that ran differently; queried after a call."""


class LeftOut(Exception):
    """A variant cannot run here; the message says why."""


@contextmanager
def apply_variant(
    name: str,
    unet: nn.Module,
    levels: Collection[int],
    min_tokens: int | None = None,
    max_head_error: float | None = None,
) -> Iterator[Coverage]:
    """Apply the named variant to the self-attention of `levels` within the block.

    Args:
        name: one of `VARIANTS`.
        unet: a denoiser, compiled or not.
        levels: resolutions whose layers are changed, 0 the highest.
        min_tokens: of agents and other methods; None keeps their own.
        max_head_error: of agents; None keeps their own.

    Raises:
        LeftOut: tomesd is missing, or the method covers none of these levels.
    """
    contexts = {
        SDPA: partial(_exact, unet),
        TOME: partial(_merged, unet, levels),
        FLOOR: partial(_floor, unet, levels),
    }
    options: dict[str, Any] = {} if min_tokens is None else {"min_tokens": min_tokens}
    method, preset = (name, DEFAULT_PRESET) if name in OTHER_METHODS else (AgentAttention.name, name)
    if method == AgentAttention.name and max_head_error is not None:
        options["max_head_error"] = max_head_error
    with contexts.get(name, partial(_patched, unet, levels, method, preset, options))() as coverage:
        yield coverage


@contextmanager
def _exact(unet: nn.Module) -> Iterator[Coverage]:
    yield lambda: 0


@contextmanager
def _patched(
    unet: nn.Module, levels: Collection[int], method: str, preset: str, options: dict[str, Any]
) -> Iterator[Coverage]:
    try:
        handle = patch(
            unet, method, preset=preset, layers=lambda spec: spec.level in levels, calibrate=False, **options
        )
    except ValueError as error:
        raise LeftOut(str(error)) from None
    with handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffAttnWarning)  # the coverage counts the accelerated layers
        yield lambda: handle.report().layers_accelerated


@contextmanager
def _floor(model: nn.Module, levels: Collection[int]) -> Iterator[Coverage]:
    """No attention; see `floor`."""
    plan = Plan(FLOOR, None, (OwnValues(),), constant(), lambda spec: spec.level in levels, {})
    with Patch(model, denoisers_of(model), plan, calibrate=False) as handle:
        yield lambda: handle.report().layers_accelerated


@contextmanager
def _merged(unet: nn.Module, levels: Collection[int]) -> Iterator[Coverage]:
    """Token merging by tomesd, without leaving anything behind (its own removal leaves attributes)."""
    try:
        import tomesd
    except ImportError:
        raise LeftOut("tomesd is not installed: pip install --no-deps tomesd==0.1.3") from None
    inner = uncompiled(unet)
    if not isinstance(inner, UNet2DConditionModel):
        raise LeftOut(f"tomesd merges the tokens of UNets only, not of a {type(inner).__name__}")
    blocks = {spec.name.removesuffix(".attn1") for spec, _ in self_attention_layers(inner) if spec.level in levels}
    try:
        tomesd.apply_patch(inner, ratio=TOME_RATIO, max_downsample=2 ** max(levels))
        for name, module in inner.named_modules():
            info: Any = module.__dict__.get("_tome_info")
            if info is not None and name and name not in blocks:  # a level that is not compared merges nothing
                module.__dict__["_tome_info"] = ChainMap({"args": info["args"] | {"max_downsample": 0}}, info)
        yield lambda: len(blocks)
    finally:
        tomesd.remove_patch(inner)
        for module in inner.modules():
            module.__dict__.pop("_tome_info", None)
