"""Coordination of a run's processes: agreement, shared work, joint failure.

A collective operation waits for the slowest process, and aborts the run after waiting longer than
`run.timeout_minutes`. Therefore no process works alone for long: work is shared, and cut into pieces with a short
exchange after each.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from diffattn.training.finite import NonFiniteLoss
from diffattn.training.signals import Stopped, StopRequest

T = TypeVar("T")

KINDS: dict[str, type[Exception]] = {
    "OSError": OSError, "ValueError": ValueError, "NonFiniteLoss": NonFiniteLoss,
}  # fmt: skip
"""Errors that are re-raised as the same type on the other processes; any other becomes a `RuntimeError` there."""

_SHARED = "on_every_process"


def is_shared(error: BaseException) -> bool:
    """Whether every process raises this error, so that it suffices for one of them to report it."""
    return getattr(error, _SHARED, False)


def agree(accelerator: Accelerator, values: dict[str, Any], hint: str) -> None:
    """Compare values over all processes.

    Args:
        accelerator: of the run; every process must call this.
        values: name -> something hashable that must be the same everywhere.
        hint: advice at the end of the message.

    Raises:
        ValueError: on every process; the message names each value that differs, and which process has it.
    """
    everywhere = gather_object([values])
    differing = []
    for name in values:
        by_value: dict[Any, list[str]] = {}
        for rank, theirs in enumerate(everywhere):
            by_value.setdefault(theirs[name], []).append(str(rank))
        if len(by_value) > 1:
            there = "; ".join(f"{value} on process {', '.join(ranks)}" for value, ranks in by_value.items())
            differing.append(f"{name} ({there})")
    if differing:
        raise shared(ValueError(f"the processes of this run disagree about {', '.join(differing)}; {hint}"))


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T | None:
    """The result of an action run on the main process only; None on the others, which wait for it.

    Raises:
        Exception: raised by the action, on every process; see `KINDS`.
    """
    value, failure = None, None
    if accelerator.is_main_process:
        try:
            value = action()
        except Exception as error:
            failure = error
    packed = [_packed(failure)]
    broadcast_object_list(packed)
    _raise_alike(failure, packed)
    return value


def together(
    accelerator: Accelerator,
    pieces: Iterable[int],
    stop: StopRequest,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run every process's share of some work, piece by piece, with an exchange between all of them after each piece.

    No process waits longer than one piece takes, however unequal the shares are.

    Args:
        accelerator: of the run; every process must call this.
        pieces: this process's share; does a piece of work whenever advanced, and yields the amount done.
        stop: ends the work once any process is asked to stop.
        progress: called after every exchange with the amount done by all processes together.

    Raises:
        Stopped: a process was asked to stop.
        Exception: a piece failed; on every process, see `KINDS`.
    """
    share, working, total = iter(pieces), True, 0
    failure: Exception | None = None
    while True:
        done: int | None = 0
        if working:
            try:
                done = next(share, None)
            except Exception as error:
                done, failure = None, error
            working = done is not None
        state = [int(working), int(failure is not None), done or 0, stop.signal]
        any_working, any_failed, amount, signal = _gathered(accelerator, state).T.tolist()
        if any(any_failed):
            _raise_alike(failure, gather_object([_packed(failure)]))
        if any(signal):
            raise Stopped(max(signal))
        total += sum(amount)
        if progress is not None:
            progress(total)
        if not any(any_working):
            return


def asked_to_stop(accelerator: Accelerator, stop: StopRequest) -> int:
    """The signal received by any process, 0 for none; collective, so every process must call it."""
    if accelerator.num_processes == 1:
        return stop.signal
    return int(_gathered(accelerator, [stop.signal]).max())


def _gathered(accelerator: Accelerator, numbers: list[int]) -> Tensor:
    """The numbers of all processes, one row per process."""
    found: Any = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    return found


def _packed(failure: Exception | None) -> tuple[str, str] | None:
    if failure is None:
        return None
    kind = next((name for name, kind in KINDS.items() if isinstance(failure, kind)), type(failure).__name__)
    return kind, str(failure)


def _raise_alike(failure: Exception | None, everywhere: list[tuple[str, str] | None]) -> None:
    """Raise this process's failure, or else the first one of the others, if any."""
    if failure is not None:
        raise shared(failure)
    for packed in everywhere:
        if packed is not None:
            kind, message = packed
            raise shared(KINDS.get(kind, RuntimeError)(message))


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises."""
    setattr(error, _SHARED, True)
    return error
