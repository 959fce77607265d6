"""What the processors of one patch share: the run under way, and the count of what happened."""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import nn

from diffattn.methods.base import LayerSpec
from diffattn.schedules import Schedule

ACCELERATED = "accelerated"
"""What is counted for a call that was accelerated; anything else is the reason why it was not."""


@dataclass(frozen=True)
class DenoiserCall:
    """What a processor needs to know of the denoiser call it is part of."""

    phase: int | tuple[int, ...]  # of the schedule, for the batch or one per sample
    grids: Mapping[int, tuple[int, int]]  # number of tokens -> (rows, columns), at every level
    compiled: bool  # part of the denoiser is compiled: the hook counts instead of the processors


class Latest:
    """The call that began last in any thread: what autograd's own threads recompute."""

    call: DenoiserCall | None = None


class RunState(threading.local):
    """The run under way, one per thread. Written outside the denoiser, before each of its calls; read inside.

    Attributes:
        call: the call under way.
        schedule: this run's own copy of the schedule.
        last_level: highest noise level of the call before; a rise begins a new run.
        scheduler_run: which setting of the scheduler's time steps that call was in, None if unknown.
    """

    call: DenoiserCall | None = None
    schedule: Schedule | None = None
    last_level: float = -1.0
    scheduler_run: int | None = None

    def __init__(self, latest: Latest) -> None:
        """Called once per thread, with the same `latest`."""
        self.latest = latest

    def begin(self, call: DenoiserCall) -> None:
        """A call of the denoiser begins in this thread."""
        self.call = self.latest.call = call

    def current(self) -> DenoiserCall | None:
        """The call of this thread; in a thread that never called the denoiser, the latest of any."""
        return self.latest.call if self.call is None else self.call

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)(Latest())
        return new


class Tally:
    """Calls per layer and reason; threads may add at the same time."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, layer: str, reason: str) -> None:
        with self._lock:
            self._counts[layer, reason] += 1

    def of(self, layer: str) -> dict[str, int]:
        """Calls of one layer by reason, `ACCELERATED` among them."""
        with self._lock:
            return {reason: n for (name, reason), n in self._counts.items() if name == layer}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)()
        with self._lock:
            new._counts.update(self._counts)
        return new


class Processor(Protocol):
    """Ours, in the place of one layer's own processor."""

    original: Any  # the processor object that was there
    active: bool  # False once the patch is removed: behaves like the original wherever it still is
    owner: Any  # the patch

    def why_exact(self, phase: int, grids: Collection[int], num_tokens: int, device: str, mask_rows: int) -> str:
        """Why a call in a phase runs exact, or `ACCELERATED`; `grids`: numbers of tokens that form a grid."""
        ...


class Architecture(Protocol):
    """How one family of denoisers is taken apart. One file per family."""

    title: str  # what is supported, as error messages list it

    def matches(self, model: nn.Module) -> bool:
        """Whether this family covers the model."""
        ...

    def layers(self, model: nn.Module) -> Iterable[tuple[LayerSpec, nn.Module]]:
        """Every attention layer, with the module that has `set_processor`."""
        ...

    def why_unsupported(self, module: nn.Module) -> str | None:
        """Why a layer must keep its processor, or None."""
        ...

    def grids(self, model: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens at every level, for latents of this size."""
        ...

    def processor(self, **parts: Any) -> Processor:
        """Our processor for one layer of this family, made of the arguments of `SelfAttentionProcessor`."""
        ...
