"""Which calls of attention are faster by the method than exactly: timed once on a call's own tensors, and then fixed.

A decision is about a kind of call, see `kind_of`: layers and steps of the same kind share it. It holds as long as the
patch, so that the clock never changes a picture in the middle of a run, and it can be given to another patch.
"""

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from diffattn.architectures.run_state import NotPickled
from diffattn.methods.base import AttentionMethod

Source = Literal["measured here", "from the cache", "from the table", "as given"]
"""Where a decision comes from; the table is what the package assumes until method and exact attention are timed."""

MARGIN = 0.9
"""A method counts as faster when it takes less than this share of the time of exact attention."""

ROUNDS = 3
"""Method and exact attention are timed this often, in turns, and the shortest time of each counts …"""

CLEAR = 1.6
"""… or twice if one takes this many times as long as the other in both rounds …"""

LONG = 0.05
"""… or once if calls take this many seconds or longer: shorter ones can be delayed that much by other work."""

REPEATS = 3
"""Calls per timing on an accelerator, where the first one hides the work of launching the next."""

SECONDS_PER_RUN = 0.5
"""On an accelerator, no further kind of call is timed in a run after this long."""

MAX_KINDS = 4096
"""More kinds of calls than a cache holds, or can be given."""


LEAST_SHARE = 0.01
"""Of the heads: a method that counts as faster may run at least this many of them exact."""

Choice = bool | float
"""What a decision comes down to, see `Decision.choice`."""


@dataclass(frozen=True)
class Decision:
    """Whether the method is used for a kind of call."""

    faster: bool
    source: Source
    seconds: float | None = None  # of one call by the method
    exact_seconds: float | None = None  # of the same call done exactly
    share: float | None = None  # see `choice`, where it is given rather than a consequence of the times

    def __post_init__(self) -> None:
        if not isinstance(self.faster, bool):
            raise ValueError(f"faster is true (use the method) or false (run exact), got {self.faster!r}")
        if self.source not in get_args(Source):
            raise ValueError(f"a decision's source is one of {', '.join(get_args(Source))}, got {self.source!r}")
        for value in (self.seconds, self.exact_seconds):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise ValueError(f"a decision's seconds are above 0, got {value!r}")

    @classmethod
    def of(cls, seconds: float, exact_seconds: float, source: Source = "measured here") -> Self:
        """The decision for these times of one call."""
        return cls(seconds < MARGIN * exact_seconds, source, seconds, exact_seconds)

    @classmethod
    def given(cls, choice: Any) -> Self:
        """The decision that comes down to `choice`.

        Raises:
            ValueError: not true, false, or a number above 0 and at most 1.
        """
        if isinstance(choice, bool):
            return cls(choice, "as given")
        if not isinstance(choice, int | float) or not 0 < choice <= 1:
            raise ValueError(
                "a decision is true (use the method), false (run exact), or the share of heads that may run exact "
                f"beside the method, above 0 and at most 1; got {choice!r}"
            )
        return cls(True, "as given", share=float(choice))

    @property
    def choice(self) -> Choice:
        """False: run exact. A number: use the method, as long as no larger share of a call's heads runs exact beside
        it, since it would then no longer be faster. True: use it, and assume that share, since nothing was timed."""
        if self.share is not None:
            return self.share
        if not self.faster or self.seconds is None or self.exact_seconds is None:
            return self.faster
        return max(round(MARGIN - self.seconds / self.exact_seconds, 2), LEAST_SHARE)

    def __str__(self) -> str:
        if self.seconds is None or self.exact_seconds is None:
            return self.source
        return f"{1e3 * self.seconds:.3g} ms against {1e3 * self.exact_seconds:.3g} ms exact, {self.source}"


def kind_of(label: str, q: Tensor, k: Tensor, heads_first: bool, masked: bool) -> str:
    """What must match for two calls to take equally long on one machine, as text.

    Args:
        label: of the method with its options, see `label_of`.
        q, k: [B, H, N, D], or [B, N, H, D] if not `heads_first`.
        heads_first: the layout of q and k.
        masked: whether the call has a mask.
    """
    tokens, heads = (2, 1) if heads_first else (1, 2)
    shape = (q.shape[0], q.shape[heads], q.shape[tokens], q.shape[3])
    keys = k.shape[tokens] if k.shape[tokens] != q.shape[tokens] else None
    return kind_text(label, q.device.type, q.dtype, shape, keys, masked)


def kind_text(
    label: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    keys: int | None = None,
    masked: bool = False,
) -> str:
    """`kind_of` from the type of a device, the sizes [B, H, N, D] of the queries, and the number of keys where it
    differs."""
    size = "x".join(str(n) for n in shape)
    beside = "" if keys is None else f", {keys} keys"
    mask = ", masked" if masked else ""
    return f"{label}: {device}, {dtype}, {size}{beside}{mask}".replace("torch.", "")


def label_of(method: AttentionMethod) -> str:
    """A method and those of its options that differ from the defaults."""
    values = {f.name: (getattr(method, f.name), f.default) for f in fields(method)}  # type: ignore[arg-type]
    options = ", ".join(f"{name}={value!r}" for name, (value, default) in values.items() if value != default)
    return f"{method.name}({options})"


class Decisions(NotPickled):
    """The decisions of one patch; threads may ask at the same time.

    Attributes:
        measures: whether kinds of calls that are not known are timed.
    """

    def __init__(self, made: Mapping[str, Decision] | None = None, measures: bool = False) -> None:
        self._made: dict[str, Decision] = dict(made or {})
        self._used: dict[str, dict[str, Decision]] = {}  # layer -> kind -> decision
        self._lock = threading.Lock()
        self._new: dict[str, dict[str, Decision]] = {}  # device -> kind -> decision, since `take_new`
        self.measures = measures

    @property
    def any_known(self) -> bool:
        """Whether any kind of call is known, so that it is not guessed."""
        return bool(self._made)

    def known(self, kind: str) -> Decision | None:
        """The decision for a kind of call, if it was made."""
        return self._made.get(kind)

    def measure(
        self, kind: str, method: Callable[[], Tensor], exact: Callable[[], Tensor], device: torch.device
    ) -> Decision:
        """Time method and exact attention, and decide; if another thread did so meanwhile, its decision stands."""
        with self._lock:
            if kind not in self._made:
                self._made[kind] = Decision.of(*_seconds(method, exact, device))
                self._new.setdefault(str(device), {})[kind] = self._made[kind]
            return self._made[kind]

    def use(self, layer: str, kind: str, decision: Decision) -> None:
        """Record for the report that a layer's calls followed a decision."""
        with self._lock:
            self._used.setdefault(layer, {})[kind] = decision

    def is_noted(self, layer: str, kind: str) -> bool:
        """Whether `use` was called for a layer and a kind of call."""
        return kind in self._used.get(layer, ())

    def used_by(self, layer: str) -> dict[str, Decision]:
        """Kind of call -> decision, for one layer."""
        with self._lock:
            return dict(self._used.get(layer, {}))

    def used(self) -> dict[str, Decision]:
        """Kind of call -> decision, for all layers."""
        with self._lock:
            return {kind: decision for found in self._used.values() for kind, decision in found.items()}

    @property
    def any_new(self) -> bool:
        """Whether anything was timed since `take_new`."""
        return bool(self._new)

    def take_new(self) -> dict[str, dict[str, Decision]]:
        """What was timed since this was last called: device -> kind of call -> decision."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def add_known(self, known: Mapping[str, Decision]) -> None:
        """Add earlier decisions, except where there is one already."""
        with self._lock:
            self._made = {**known, **self._made}

    def replace(self, given: Mapping[str, Decision]) -> None:
        """Set these decisions, whatever was decided before."""
        with self._lock:
            self._made = {**self._made, **given}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = type(self)(self._made, self.measures)
        new._used = copy.deepcopy(self._used, memo)
        return new


def read_given(given: Any) -> dict[str, Decision]:
    """The decisions of `diffattn.patch(decisions=...)`, which a picture's record or a recipe may hold.

    Raises:
        ValueError: not a mapping from kinds of calls to true, false, or a share of heads.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(kind, str) for kind in given):
        raise ValueError(
            f"decisions must be a mapping from kinds of calls to true, false or a number, got {type(given).__name__}"
        )
    if len(given) > MAX_KINDS:
        raise ValueError(f"at most {MAX_KINDS} decisions can be given, got {len(given)}")
    return {kind: Decision.given(choice) for kind, choice in given.items()}


def decision_from(entry: Any) -> Decision:
    """A decision of a cache file.

    Raises:
        ValueError: not what `entry_of` returns.
    """
    if not isinstance(entry, Mapping) or set(entry) != {"faster", "seconds", "exact_seconds"}:
        raise ValueError(f"a decision has faster, seconds and exact_seconds, got {entry!r:.100}")
    return Decision(source="from the cache", **entry)


def entry_of(decision: Decision) -> dict[str, Any]:
    """A decision made here as JSON types, without its source."""
    return {name: value for name, value in asdict(decision).items() if name not in ("source", "share")}


def can_measure(q: Tensor) -> bool:
    """Whether a call can be timed: real tensors, no gradients, nothing being compiled or captured, one process."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(q) is not Tensor or q.device.type == "meta":
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() == 1  # else processes might decide differently
    return q.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _seconds(method: Callable[[], Tensor], exact: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds of one call of each: the shortest, since other work on the machine can only make a call longer."""
    for call in (exact, method):  # a first call also prepares what later ones reuse, such as a kernel of this shape
        call()
    rounds: list[tuple[float, float]] = []
    while len(rounds) < ROUNDS:
        exact_seconds = _clock(exact, device)
        rounds.append((_clock(method, device), exact_seconds))
        enough = len(rounds) >= 2 or min(rounds[0]) >= LONG
        if enough and {_clearly_faster(*pair) for pair in rounds} in ({True}, {False}):
            break
    mine, theirs = zip(*rounds, strict=True)
    return min(mine), min(theirs)


def _clearly_faster(seconds: float, exact_seconds: float) -> bool | None:
    """Whether the method is the faster one; None: it takes about as long."""
    ratio = seconds / exact_seconds
    return None if 1 / CLEAR < ratio < CLEAR else ratio < 1


def _clock(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds per call, the device's work included."""
    waits = device.type != "cpu"
    repeats = REPEATS if waits else 1
    if waits:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if waits:
        torch.accelerator.synchronize(device)
    return max((time.perf_counter() - start) / repeats, 1e-9)
