"""Whether a layer's method or its exact attention is the faster one: by what was timed, or by a guess."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffattn.architectures.decisions import (
    SECONDS_PER_RUN,
    Choice,
    Decision,
    Decisions,
    can_measure,
    kind_of,
    kind_text,
    label_of,
)
from diffattn.architectures.run_state import NotPickled, RunState
from diffattn.methods.base import AttentionMethod, LayerCall, LayerSpec

ASSUMED_SHARE = 1 / 2
"""The share of heads that may run exact, where nothing was timed, before a method that is faster without them no longer
is; half of it below 4,096 tokens."""


class Ways:
    """A call of attention by a method, and the same call done exactly."""

    def __init__(
        self,
        method: Callable[[dict[str, Any] | None, bool], tuple[Tensor, LayerCall]],
        exact: Callable[[], Tensor],
        memory: dict[str, Any] | None,
    ) -> None:
        """`method`: the call, given its memory and whether it is a trial; both as in `LayerCall`."""
        self._method = method
        self.exact = exact
        self.memory = memory
        self._scratch: dict[str, Any] | None = None if memory is None else {}

    def method(self) -> tuple[Tensor, LayerCall]:
        """The output, and what the method says about the call."""
        return self._method(self.memory, False)

    def trial(self) -> Tensor:
        """The method alone, to be timed."""
        return self._method(self._scratch, True)[0]


class Faster(NotPickled):
    """Which way of one layer is faster. A kind of call (see `kind_of`) is None where it is unknown: then by a guess."""

    def __init__(
        self, layer: LayerSpec, methods: Sequence[AttentionMethod | None], run: RunState, decisions: Decisions
    ) -> None:
        """`methods`: one per phase; None is exact."""
        self.layer = layer
        self.methods = tuple(methods)
        self.labels = tuple(label_of(m) if m else None for m in methods)
        self.run = run
        self.decisions = decisions

    def kind(self, phase: int, q: Tensor, k: Tensor, heads_first: bool, masked: bool) -> str | None:
        """The kind of a call; None where it is not needed. Compiled code cannot name sizes that vary: it only looks up
        what is known."""
        label = self.labels[phase]
        if label is None or (torch.compiler.is_compiling() and not self.decisions.any_known):
            return None
        return kind_of(label, q, k, heads_first, masked)

    def kind_at(self, phase: int, device: str, dtype: torch.dtype, batch: int, tokens: int, masked: bool) -> str | None:
        """The kind of a call that is expected of the layer."""
        label, layer = self.labels[phase] if phase >= 0 else None, self.layer
        if label is None or layer.keys_only:
            return None
        shape = (batch, layer.num_heads, tokens, layer.head_dim)
        return kind_text(label, device, dtype, shape, masked=masked)

    def reason_slower(self, phase: int, num_tokens: int, device: str, kind: str | None) -> str | None:
        """Why exact attention is used where the method could run, or None.

        Args:
            phase: of the schedule.
            num_tokens: see `AttentionMethod.reason_slower`.
            device: torch device type.
            kind: of the call.
        """
        method = self._method(phase)
        guess = method.reason_slower(num_tokens, device)
        if kind is None or not _is_timed(method):
            return guess
        choice = self._choice(kind)
        if choice or (choice is None and guess is None):
            return None
        is_guess = choice is None or self.decisions.known(kind) is None
        return guess if guess and is_guess else f"{num_tokens} tokens: exact attention is faster here"

    def most_exact(self, phase: int, num_tokens: int, kind: str | None) -> float:
        """The largest share of heads that may run exact before a layer does in all of them; arguments as in
        `reason_slower`."""
        if not _is_timed(self._method(phase)):
            return 1.0
        choice = self._choice(kind)
        if choice is None or isinstance(choice, bool):
            return ASSUMED_SHARE if num_tokens >= 4096 else ASSUMED_SHARE / 2
        return choice

    def decide(self, phase: int, num_tokens: int, kind: str, q: Tensor, ways: Ways) -> None:
        """Decide whether this run uses the method for a kind of call, unless that is settled: by what is known, by
        timing both, or by a guess; arguments as in `reason_slower`.

        Args:
            q: the queries.
            ways: the call by the method, and exactly.
        """
        run, decisions, method, device = self.run, self.decisions, self._method(phase), q.device
        if not _is_timed(method):
            return
        if kind not in run.decided:
            decision = decisions.known(kind)
            has_time = device.type == "cpu" or run.timing <= SECONDS_PER_RUN
            if decision is None and decisions.measures and has_time and can_measure(q):
                start = time.monotonic()
                decision = decisions.measure(kind, ways.trial, ways.exact, device)
                run.timing += time.monotonic() - start
            if decision is None:
                decision = Decision(method.reason_slower(num_tokens, device.type) is None, "from the table")
            run.decided[kind] = decision.choice
            decisions.use(self.layer.name, kind, decision)
        elif not decisions.is_noted(self.layer.name, kind):
            known = decisions.known(kind) or Decision(bool(run.decided[kind]), "from the table")
            decisions.use(self.layer.name, kind, known)

    def _choice(self, kind: str | None) -> Choice | None:
        """What was decided about a kind of call, in this run or before it; None: nothing."""
        if kind is None:
            return None
        known = self.decisions.known(kind) if self.decisions.any_known else None
        choice = None if known is None else known.choice
        if torch.compiler.is_compiling():  # compiled code must not depend on the run
            return choice
        return self.run.decided.get(kind, choice)

    def _method(self, phase: int) -> AttentionMethod:
        method = self.methods[phase]
        assert method is not None
        return method


def _is_timed(method: AttentionMethod) -> bool:
    """Whether times decide about a method, rather than a size that was given."""
    return method.timed and not method.is_size_given
