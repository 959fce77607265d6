"""A record of every step of one run: mediators or agents, change of the latents, which layers ran accelerated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.patching.patch import Patch

PLACES = ("down_blocks", "mid_block", "up_blocks")
"""The parts of a UNet, in the order in which they run."""


@dataclass
class RunTrace:
    """One row per call of the denoiser."""

    title: str
    layers: list[str] = field(default_factory=list)  # that the patch covers, in the order in which they run
    tokens: list[int | None] = field(default_factory=list)  # of each layer; None: it did not run
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
        """All fields as JSON types, and the switches."""
        return asdict(self) | {"switches": self.switches}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: anything else.
        """
        try:
            trace = cls(**{name: found[name] for name in cls.__dataclass_fields__})
            trace._check()
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the steps of a run: {type(error).__name__} {error}") from None
        return trace

    def _check(self) -> None:
        """Raise `ValueError` or `TypeError` for values that no run has."""
        calls, layers = len(self.seconds), len(self.layers)
        of_calls = (self.accelerated, self.numbers, self.noise_levels, self.changes)
        if any(len(values) != calls for values in of_calls) or len(self.tokens) != layers:
            raise ValueError("not the steps of a run: its lists differ in length")
        if any(len(row) != layers for row in self.accelerated):
            raise ValueError("not the steps of a run: a step has other layers")
        figures = [*self.numbers, *self.noise_levels, *self.changes, *self.tokens, *self.seconds]
        if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in figures):
            raise ValueError("not the steps of a run: a figure is not a number")
        if not all(isinstance(text, str) for text in (self.title, *self.layers)):
            raise ValueError("not the steps of a run: a name is not text")


class Recorder:
    """Extends a trace after every call of a patched or unpatched denoiser, in the thread that runs it."""

    def __init__(self, title: str, patch: Patch | None) -> None:
        self.patch = patch
        report = patch.report() if patch else None
        names = [layer.name for layer in report.layers if layer.left_alone is None] if report else []
        self.trace = RunTrace(title, in_order(names), [None] * len(names))
        self._counts = self._accelerated()
        self._changes: list[Tensor | None] = []  # on their device
        self._numbers: dict[int, int | None] = {}  # of the phases so far

    def finished(self) -> RunTrace:
        """The trace with all changes of the latents so far; synchronises with their device."""
        known = len(self.trace.changes)
        fresh = [x for x in self._changes[known:] if x is not None]
        values = iter(torch.stack(fresh).tolist() if fresh else ())
        self.trace.changes += [None if x is None else next(values) for x in self._changes[known:]]
        if self.patch is not None:
            tokens = {layer.name: layer.tokens for layer in self.patch.report().layers}
            self.trace.tokens = [tokens.get(name) for name in self.trace.layers]
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


def in_order(names: Sequence[str]) -> list[str]:
    """Names of layers in the order in which the network runs them; a UNet lists its middle block last."""
    keys = dict[str, tuple[str, int]]()
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in PLACES), None)
        keys[name] = ("", 0) if at is None else (".".join(parts[:at]), PLACES.index(parts[at]))
    networks = list(dict.fromkeys(network for network, _ in keys.values()))
    return sorted(names, key=lambda name: (networks.index(keys[name][0]), keys[name][1]))


def _number_of(patch: Patch, phase: int) -> int | None:
    """The method's size for the layer with the most tokens."""
    method = patch.plan.methods[phase]
    tokens = [layer.tokens for layer in patch.report().layers if layer.tokens and layer.left_alone is None]
    return method.size(max(tokens)) if method is not None and tokens else None
