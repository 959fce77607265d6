"""The DiT/SiT backbone of this package.

Shapes: B batch, H heads, N image tokens, D channels per head, C = H·D.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffattn.architectures.base import Replaced, Size
from diffattn.architectures.by_phase import by_phase
from diffattn.architectures.dit_time import read_dit_time
from diffattn.architectures.faster import Ways
from diffattn.architectures.processor import MethodProcessor
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall
from diffattn.methods.base import LayerCall, LayerSpec
from diffattn.models import DiT
from diffattn.models.attention import name_of
from diffattn.models.attention_layer import Attention, AttentionLayer
from diffattn.models.config import token_grid
from diffattn.models.mediator import MediatorAttention
from diffattn.noise_level import Reading, TimeReader, values_of

STEPS_TO_COME = 64
"""Resolution of the noise levels of the rest of a run whose steps are unknown."""


class SiTArchitecture:
    """`DiT`, with whatever attention in its layers."""

    title = "DiT (diffattn.models: DiT, SiT, mediators)"
    sample_name = "x"
    time_name = "t"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, DiT)

    def layers(self, model: nn.Module) -> Iterator[tuple[LayerSpec, nn.Module]]:
        for name, module in model.named_modules():
            if isinstance(module, Attention) or hasattr(module, "set_processor"):
                yield _spec(name, module), module

    def reason_exact(self, module: nn.Module) -> str | None:
        if not isinstance(module, AttentionLayer):
            return f"attention class {type(module).__name__}"
        theirs = _genuine(module.processor)
        return None if theirs is None else f"custom processor {type(theirs).__name__}"

    def entry(self, model: nn.Module) -> nn.Module:
        return _dit(model).x_embedder

    def sample(self, given: Mapping[str, Any]) -> Tensor:
        return given[self.sample_name]

    def timestep(self, given: Mapping[str, Any]) -> Any:
        return given[self.time_name]

    def size(self, model: nn.Module, given: Mapping[str, Any]) -> Size:
        height, width = self.sample(given).shape[-2:]
        return Size(height, width)

    def grids(self, model: nn.Module, height: int, width: int, frames: int | None = None) -> list[tuple[int, int]]:
        return [token_grid((height, width), _dit(model).patch_size)]

    def read_time(self, model: nn.Module, time: Any, levels: TimeReader) -> Reading:
        """The noise level of a time t. If time runs from noise to data it is u = 1 - t, as on the linear path, and the
        run continues from there to 0.

        On the GVP path u also falls monotonically, but is another noise level. Time from data to noise is a discrete
        step: of the pipeline's scheduler or, without one, of DiT's training schedule. A time on the CPU is read without
        waiting.
        """
        if _dit(model).config["time_direction"] == "noise_to_data":
            now = [min(max(1 - t, 0.0), 1.0) for t in values_of(time)]
            return Reading(now, [max(now) * i / STEPS_TO_COME for i in range(STEPS_TO_COME, -1, -1)], None)
        return read_dit_time(time, levels)

    def replaced(self, **parts: Any) -> Replaced:
        processor = SiTProcessor(**parts)
        return Replaced(processor, processor)


class SiTProcessor(MethodProcessor):
    """Runs a method where it applies, and the layer's own `attend` everywhere else."""

    def __call__(
        self,
        layer: AttentionLayer,
        x: Tensor,  # [B, N, C]
        q: Tensor,  # [B, H, N, D], like k and v
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        num_mediators: int,
    ) -> Tensor:
        call = self._current_call()
        if call is None:
            return self._exact(layer, x, q, k, v, grid, num_mediators)
        if reason := self._reason_together(call, q.shape[0]):
            self._count(call, reason)
            return self._exact(layer, x, q, k, v, grid, num_mediators)

        def run(phase: int, *tensors: Tensor) -> Tensor:
            return self._run(call, phase, layer, tensors, grid, num_mediators)

        return by_phase(call.phase, run, x, q, k, v)

    def _run(
        self,
        call: DenoiserCall,
        phase: int,
        layer: AttentionLayer,
        tensors: tuple[Tensor, ...],  # x, q, k, v
        grid: tuple[int, int],
        num_mediators: int,
    ) -> Tensor:
        """All samples are in one phase: [B, H, N, D]."""
        x, q, k, v = tensors
        key = self._settling(call, q, k)
        if reason := self._settled(key):
            self._count(call, reason)
            return self._exact(layer, x, q, k, v, grid, num_mediators)
        layout = self.layout_of(grid, (), q.shape[2])

        def by_method(memory: dict[str, Any] | None, is_trial: bool) -> tuple[Tensor, LayerCall]:
            made = LayerCall(
                x, grid, phase=phase, mediate=_mediate(layer, grid), memory=memory, is_trial=is_trial,
                fixed_heads=self._fixed_now(phase),
            )  # fmt: skip
            return self.functions[phase](q, k, v, made).to(v.dtype), made  # type: ignore[misc]

        def exact() -> Tensor:
            return self._exact(layer, x, q, k, v, grid, num_mediators)

        ways = Ways(by_method, exact, self._memory(call, phase, None if phase == call.phase else phase))
        reason = self.reason_impossible(phase, layout, q.device.type, mask_rows=0)
        kind = None if reason else self.faster.kind(phase, q, k, heads_first=True, masked=False)
        reason = reason or self._reason_timed(call, phase, q, layout.num_tokens, kind, ways)
        self._settle(key, reason)
        reason = reason or self._reason_heads(phase, layout.num_tokens, kind, ways.memory) or ACCELERATED
        self._count(call, reason)
        if reason != ACCELERATED:
            return exact()
        out, layer_call = ways.method()
        self._count_heads(layer_call)
        return out

    def _exact(
        self,
        layer: AttentionLayer,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int],
        num_mediators: int,
    ) -> Tensor:
        """The layer's output without a method."""
        if self.original is None:
            return layer.attend(q, k, v, grid, num_mediators)
        return self.original(layer, x, q, k, v, grid, num_mediators)


def _genuine(processor: Any) -> Any:
    """The processor itself, or the original of one of ours that was reinstalled after its removal."""
    while isinstance(processor, SiTProcessor) and not processor.active:
        processor = processor.original
    return processor


def _mediate(layer: AttentionLayer, grid: tuple[int, int]) -> Callable[[Tensor, Tensor, Tensor, int], Tensor] | None:
    """The layer's learned mediator attention, with a given number of mediators."""
    if not isinstance(layer, MediatorAttention):
        return None
    return lambda q, k, v, num_mediators: layer.attend(q, k, v, grid, num_mediators)


def _dit(model: nn.Module) -> DiT:
    assert isinstance(model, DiT)
    return model


def _spec(name: str, module: nn.Module) -> LayerSpec:
    if not isinstance(module, AttentionLayer):
        return LayerSpec(name, level=0, num_heads=1, head_dim=0, kind=name_of(module))
    return LayerSpec(
        name=name,
        level=0,
        num_heads=module.num_heads,
        head_dim=module.qkv.in_features // module.num_heads,
        kind=name_of(module),
        mediators=module.mediators if isinstance(module, MediatorAttention) else (),
    )
