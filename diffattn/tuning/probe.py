"""Measures errors and costs of settings on a model's real q, k, v, without changing what it draws.

Shapes: B batch, H heads, N tokens of the picture, c others (text), D channels per head.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.architectures.denoisers import denoisers_of
from diffattn.measure.flops import count_gflops
from diffattn.measure.interleave import interleave
from diffattn.methods.base import (
    AttentionFn,
    AttentionMethod,
    LayerCall,
    LayerSpec,
    Preset,
    TokenLayout,
    join_exact,
)
from diffattn.patching.patch import Patch
from diffattn.patching.plan import Plan
from diffattn.schedules import constant
from diffattn.tuning.settings import Setting

TIME, FLOPS = "time", "flops"
COSTS = (TIME, FLOPS)
"""Units of cost: measured seconds, or counted GFLOPs."""

SHORTEST = 2e-3  # seconds: shorter calls are timed several at a time


@dataclass(frozen=True)
class Sample:
    """The inputs of one call of one layer."""

    layer: LayerSpec
    q: Tensor  # [B, H, N + c, D], like k and v
    k: Tensor
    v: Tensor
    call: LayerCall


@dataclass
class Log:
    """The observations of a probe.

    Attributes:
        band: of the current denoiser call; set by the caller.
        errors: (layer, band, setting) -> ‖ô - o‖² / ‖o‖² of every call.
        kinds: layer -> what its cost depends on.
        samples: the first inputs of every kind.
    """

    band: int = 0
    errors: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    kinds: dict[str, Hashable] = field(default_factory=dict)
    samples: dict[Hashable, Sample] = field(default_factory=dict)

    def error(self, layer: str, band: int, setting: int) -> float:
        """Root mean square over the calls; infinite if there was none, or one that is not finite."""
        found = self.errors.get((layer, band, setting))
        mean = float(torch.stack(found).mean()) if found else math.inf
        return math.sqrt(mean) if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Probe(AttentionMethod):
    """Exact attention that also tries every setting and records its error."""

    settings: tuple[AttentionMethod, ...]
    log: Log

    name: ClassVar[str] = "probe"
    presets: ClassVar[Mapping[str, Preset]] = {}

    def reason_layer(self, layer: LayerSpec) -> str | None:
        reasons = [m.reason_layer(layer) for m in self.settings]
        return reasons[0] if all(reasons) else super().reason_layer(layer)

    def supports(self, layer: LayerSpec) -> bool:
        return not layer.is_cross_attention

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return None

    def reason_layout(self, layout: TokenLayout) -> str | None:
        reasons = [m.reason_layout(layout) for m in self.settings]
        return reasons[0] if all(reasons) else None

    def build(self, layer: LayerSpec) -> AttentionFn:
        functions = [None if m.reason_layer(layer) else m.build(layer) for m in self.settings]

        def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
            exact = _exact(q, k, v, call)
            masks = tuple(None if mask is None else mask.shape for mask in (call.mask, call.context_mask))
            kind = (q.shape, k.shape, call.layout, q.dtype, masks, layer.upcast)
            self.log.kinds[layer.name] = kind
            self.log.samples.setdefault(kind, Sample(layer, q.clone(), k.clone(), v.clone(), call))
            for i, (method, function) in enumerate(zip(self.settings, functions, strict=True)):
                if function and not _reason(method, layer, q.device.type, call):
                    error = _squared_error(function(q, k, v, call), exact)
                    self.log.errors[layer.name, self.log.band, i].append(error)
            return exact

        return attention


@contextmanager
def probing(pipe: Any, settings: Sequence[Setting], log: Log) -> Any:
    """Put a probe into every layer that a setting can accelerate, within the block.

    Raises:
        ValueError: there are no such layers.
    """
    probe = Probe(tuple(s.method for s in settings), log)
    with Patch(pipe, denoisers_of(pipe), Plan(probe.name, None, (probe,), constant(), None, {})) as patch:
        yield patch


@dataclass(frozen=True)
class Costs:
    """Costs of one call: of attention by layer and setting, and of the whole denoiser."""

    exact: Mapping[str, float]  # layer -> seconds or GFLOPs
    settings: Mapping[tuple[str, int], float]  # (layer, setting)

    def saving(self, layer: str, setting: int) -> float:
        """The saving in one call of a layer; negative if the setting costs more than exact attention."""
        return self.exact[layer] - self.settings[layer, setting]


def measure_costs(log: Log, settings: Sequence[Setting], unit: str, rounds: int, device: torch.device) -> Costs:
    """Cost of every setting in every layer that a probe saw, on the recorded inputs.

    Args:
        log: of a probe.
        settings: what was probed.
        unit: one of `COSTS`.
        rounds: of timing; the settings of a layer take turns.
        device: where the layers compute.
    """
    by_kind = {kind: _kind_costs(sample, log, settings, unit, rounds, device) for kind, sample in log.samples.items()}
    exact = {layer: by_kind[kind][""] for layer, kind in log.kinds.items()}
    tried = {(layer, i) for layer, _, i in log.errors}
    return Costs(exact, {(layer, i): by_kind[log.kinds[layer]][settings[i].name] for layer, i in tried})


def _kind_costs(
    sample: Sample, log: Log, settings: Sequence[Setting], unit: str, rounds: int, device: torch.device
) -> dict[str, float]:
    """Name of a setting, "" for exact attention -> cost of one call."""
    tried = {i for layer, _, i in log.errors if layer == sample.layer.name}
    variants: dict[str, Callable[[], Any]] = {"": lambda: _exact(sample.q, sample.k, sample.v, sample.call)}
    for i in sorted(tried):
        function = settings[i].method.build(sample.layer)
        variants[settings[i].name] = lambda f=function: f(sample.q, sample.k, sample.v, sample.call)
    with torch.no_grad():
        if unit == FLOPS:
            return {name: count_gflops(call) for name, call in variants.items()}
        once = interleave({"": variants[""]}, 1, device=device).seconds("").median
        repeats = min(max(math.ceil(SHORTEST / max(once, 1e-6)), 1), 20)
        timings = interleave({n: _repeated(c, repeats) for n, c in variants.items()}, rounds, device=device)
        return {name: timings.seconds(name).median / repeats for name in variants}


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            call()

    return several


def _reason(method: AttentionMethod, layer: LayerSpec, device: str, call: LayerCall) -> str | None:
    """Why a method would run a call exact, or None."""
    mask_rows, tokens = 0 if call.mask is None else call.mask.shape[2], call.layout.num_tokens
    reason = method.reason_layout(call.layout) or method.reason_call(layer, tokens, device, mask_rows)
    return reason or method.reason_slower(tokens, device)


def _exact(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    if call.context_mask is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=call.mask)
    picture = scaled_dot_product_attention(call.layout.on_grid(q), k, v, attn_mask=call.mask)
    return join_exact(picture, q, k, v, call)


def _squared_error(found: Tensor, exact: Tensor) -> Tensor:
    exact = exact.float()
    return (found.float() - exact).square().sum() / exact.square().sum()
