"""A record of every step of one run: mediators or agents, change of the latents, which layers ran accelerated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.patching.patch import Patch


@dataclass
class RunTrace:
    """One row per call of the denoiser."""

    title: str
    layers: list[str] = field(default_factory=list)  # that the patch covers
    accelerated: list[list[bool]] = field(default_factory=list)  # [calls][layers]
    numbers: list[int | None] = field(default_factory=list)  # mediators or agents of the largest layer; None: exact
    noise_levels: list[float | None] = field(default_factory=list)  # 1 noise ... 0 data; None: not patched
    changes: list[float | None] = field(default_factory=list)  # mean |x_k - x_{k-1}| of the denoiser's inputs
    seconds: list[float] = field(default_factory=list)  # of the call and the time since the one before

    @property
    def switches(self) -> list[int]:
        """The calls at which the number of mediators or agents changes."""
        pairs = enumerate(zip(self.numbers, self.numbers[1:], strict=False), start=1)
        return [call for call, (before, now) in pairs if before != now]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the switches."""
        return asdict(self) | {"switches": self.switches}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


class Recorder:
    """Extends a trace after every call of a patched or unpatched denoiser, in the thread that runs it."""

    def __init__(self, title: str, patch: Patch | None) -> None:
        self.patch = patch
        report = patch.report() if patch else None
        names = [layer.name for layer in report.layers if layer.left_alone is None] if report else []
        self.trace = RunTrace(title, names)
        self._counts = self._accelerated()
        self._changes: list[Tensor | None] = []  # on their device
        self._numbers: dict[int, int | None] = {}  # of the phases so far

    def finished(self) -> RunTrace:
        """The trace with all changes of the latents so far; synchronises their device."""
        known = len(self.trace.changes)
        fresh = [x for x in self._changes[known:] if x is not None]
        values = iter(torch.stack(fresh).tolist() if fresh else ())
        self.trace.changes += [None if x is None else next(values) for x in self._changes[known:]]
        return self.trace

    def record(self, change: Tensor | None, seconds: float) -> None:
        """Add a completed call.

        Args:
            change: of the latents, a scalar on the device; only read by `finished`.
            seconds: of the call and the time since the one before.
        """
        before, self._counts = self._counts, self._accelerated()
        trace = self.trace
        trace.accelerated.append([self._counts[name] > before[name] for name in trace.layers])
        entry = self.patch.last_call() if self.patch else None
        level, phase = (entry["noise_level"], entry["phase"]) if entry else (None, None)
        trace.noise_levels.append(min(level) if isinstance(level, list) else level)
        trace.numbers.append(self._number(phase) if any(trace.accelerated[-1]) else None)
        self._changes.append(change)
        trace.seconds.append(seconds)

    def _accelerated(self) -> dict[str, int]:
        return {name: self.patch.accelerated(name) for name in self.trace.layers} if self.patch else {}

    def _number(self, phase: Any) -> int | None:
        """`_number_of`, computed once per phase."""
        if self.patch is None or not isinstance(phase, int):
            return None
        if phase not in self._numbers:
            self._numbers[phase] = _number_of(self.patch, phase)
        return self._numbers[phase]


def _number_of(patch: Patch, phase: int) -> int | None:
    """The method's size for the layer with the most tokens."""
    method = patch.plan.methods[phase]
    tokens = [layer.tokens for layer in patch.report().layers if layer.tokens and layer.left_alone is None]
    return method.size(max(tokens)) if method is not None and tokens else None
