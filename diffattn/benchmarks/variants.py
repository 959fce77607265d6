"""The variants of the benchmark: each changes a UNet within a `with` block, and then restores it."""

import warnings
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffattn.architectures.denoisers import self_attention_layers, uncompiled
from diffattn.methods.agent import AgentAttention
from diffattn.methods.keys import DownsampledKeys
from diffattn.methods.tiles import TiledAttention
from diffattn.patching.hook import DiffAttnWarning
from diffattn.patching.patch import patch
from diffattn.patching.plan import DEFAULT_PRESET

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
    name: str, unet: nn.Module, levels: Collection[int], min_tokens: int | None = None
) -> Iterator[Coverage]:
    """Apply the named variant to the self-attention of `levels` within the block.

    Args:
        name: one of `VARIANTS`.
        unet: a `UNet2DConditionModel`, compiled or not.
        levels: resolutions whose layers are changed, 0 the highest.
        min_tokens: of agents and other methods; None keeps their own.

    Raises:
        LeftOut: tomesd is missing, or the method covers none of these levels.
    """
    contexts = {
        SDPA: partial(_exact, unet),
        TOME: partial(_merged, unet, levels),
        FLOOR: partial(_values_only, unet, levels),
    }
    method, preset = (name, DEFAULT_PRESET) if name in OTHER_METHODS else (AgentAttention.name, name)
    with contexts.get(name, partial(_patched, unet, levels, method, preset, min_tokens))() as coverage:
        yield coverage


@contextmanager
def _exact(unet: nn.Module) -> Iterator[Coverage]:
    yield lambda: 0


@contextmanager
def _patched(
    unet: nn.Module, levels: Collection[int], method: str, preset: str, min_tokens: int | None
) -> Iterator[Coverage]:
    options: dict[str, Any] = {} if min_tokens is None else {"min_tokens": min_tokens}
    try:
        handle = patch(unet, method, preset=preset, layers=lambda spec: spec.level in levels, **options)
    except ValueError as error:
        raise LeftOut(str(error)) from None
    with handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffAttnWarning)  # the coverage counts the accelerated layers
        yield lambda: handle.report().layers_accelerated


@contextmanager
def _values_only(unet: nn.Module, levels: Collection[int]) -> Iterator[Coverage]:
    """The floor: each token's own value instead of attention, so no q, no k, no softmax."""
    changed = [module for spec, module in self_attention_layers(unet) if spec.level in levels]
    originals = [module.processor for module in changed]
    try:
        for module in changed:
            module.set_processor(ValueProcessor())
        yield lambda: len(changed)
    finally:
        for module, original in zip(changed, originals, strict=True):
            module.set_processor(original)


class ValueProcessor:
    """Attention that returns each token's own value: what remains when attention costs nothing."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


@contextmanager
def _merged(unet: nn.Module, levels: Collection[int]) -> Iterator[Coverage]:
    """Token merging by tomesd, without leaving anything behind (its own removal leaves attributes)."""
    try:
        import tomesd
    except ImportError:
        raise LeftOut("tomesd is not installed: pip install --no-deps tomesd==0.1.3") from None
    inner = uncompiled(unet)
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
