"""A weak reference to what was patched."""

import weakref
from typing import Any, Self

from torch import nn

from diffattn.architectures.denoisers import Pipeline, denoiser_of, uncompiled
from diffattn.architectures.run_state import NotPickled


class Target(NotPickled):
    """A pipeline or a denoiser; in a deep copy of it, the copied one."""

    def __init__(self, target: Any) -> None:
        self._ref = weakref.ref(target)
        self._is_own = True  # False: of a copy of its denoiser alone
        self._scheduler = getattr(target, "scheduler", None)

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a pipeline that still exists."""
        return isinstance(self._ref(), Pipeline)

    @property
    def subject(self) -> Any:
        """The pipeline or denoiser, if it still exists."""
        return self._ref()

    def replaced(self, model: nn.Module) -> nn.Module | None:
        """What the pipeline draws with by now instead of a denoiser; None if it still draws with that, alone or inside
        of another module, or is gone."""
        pipe = self._ref()
        now = denoiser_of(pipe) if isinstance(pipe, Pipeline) and self._is_own else None
        if not isinstance(now, nn.Module) or any(part is uncompiled(model) for part in now.modules()):
            return None
        return now

    @property
    def scheduler(self) -> Any:
        """The pipeline's current scheduler, or its last one if the pipeline is gone; None for a denoiser."""
        self._scheduler = getattr(self._ref(), "scheduler", self._scheduler)
        return self._scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = object.__new__(type(self))
        target = self._ref()
        new._ref = self._ref if target is None else weakref.ref(memo.get(id(target), target))
        new._is_own = self._is_own and id(target) in memo
        new._scheduler = self._scheduler
        return new
