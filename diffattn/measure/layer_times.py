"""Times and operations of one model call by layer, in the projections and between them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from diffattn.measure.clock import mark, seconds_between, synchronize


@dataclass(frozen=True)
class LayerSeconds:
    """The times of one layer in one call of the model."""

    whole: float  # from its first operation to its last
    projections: float  # of that, in its `nn.Linear` modules

    @property
    def core(self) -> float:
        """Everything except projections: products of q, k and v, softmax, and tensor copies."""
        return self.whole - self.projections


class LayerTimer:
    """Times modules, and the linear layers inside each, with hooks that exist only within a `with` block.

    On CUDA, events on the current stream are used, so that nothing waits; elsewhere the device is synchronised at both
    ends.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """`modules`: name -> what to time; `device`: where it runs."""
        self.calls: list[dict[str, LayerSeconds]] = []  # one for every `with` block
        self._modules = modules
        self._device = device
        self._stack = ExitStack()
        self._spans: list[tuple[str, bool, Any, Any]] = []  # name, whether a projection, begin and end

    def __enter__(self) -> Self:
        self._spans = []
        with ExitStack() as stack:
            for name, module in self._modules.items():
                self._watch(stack, module, name, False)
                for child in module.modules():
                    if isinstance(child, nn.Linear):
                        self._watch(stack, child, name, True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        synchronize(self._device)
        seconds = {name: {False: 0.0, True: 0.0} for name in self._modules}
        for name, projection, begin, end in self._spans:
            seconds[name][projection] += seconds_between(begin, end)
        self.calls.append({name: LayerSeconds(s[False], s[True]) for name, s in seconds.items()})

    def _watch(self, stack: ExitStack, module: nn.Module, name: str, projection: bool) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(mark(self._device))

        def after(*_: Any) -> None:
            self._spans.append((name, projection, begun.pop(), mark(self._device)))

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)


@dataclass(frozen=True)
class Gflops:
    """GFLOPs of a call; a multiply-add counts as two, see `flops`."""

    total: float
    layers: Mapping[str, float]


def count_layer_gflops(model: nn.Module, names: Sequence[str], args: Any, kwargs: Any) -> Gflops | None:
    """GFLOPs of one call and of the named modules in it, counted on a weightless copy; the model is not run.

    None where that copy cannot run because its code needs values.
    """
    twin, on_meta = weightless(model), _to_meta()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            twin(*tree_map(on_meta, args), **tree_map(on_meta, kwargs))
    except (RuntimeError, NotImplementedError):
        return None
    counts, root = counter.get_flop_counts(), type(twin).__name__
    layers = {name: sum(counts.get(f"{root}.{name}", {}).values()) / 1e9 for name in names}
    return Gflops(counter.get_total_flops() / 1e9, layers)


def weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying the weights."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _to_meta() -> Callable[[Any], Any]:
    return lambda x: x.to("meta") if isinstance(x, Tensor) else x
