"""Signals that ask a training to stop: SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl+C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
PATIENCE = 2.0
"""Seconds after which another Ctrl+C ends the program at once; launchers repeat the first one immediately."""


class Stopped(Exception):
    """A signal stopped the run. Its progress, if any, is in a checkpoint.

    Args:
        signal_number: which signal.
        where: what the run was doing, for the message.
    """

    def __init__(self, signal_number: int, where: str = "while work was in progress") -> None:
        self.signal = signal.Signals(signal_number)
        super().__init__(f"stopped by {self.signal.name} {where}")

    @property
    def exit_code(self) -> int:
        """128 plus the signal number, as in shells: 130 for Ctrl+C, 143 for SIGTERM."""
        return 128 + self.signal


class StopRequest:
    """Whether a signal arrived; `listening` sets it."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._process = os.getpid()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        if os.getpid() != self._process:  # a worker process that inherited the handler
            _die_of(number)
        elif number == signal.SIGINT and self.signal and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
        elif not self.signal:
            self.signal, self._since = int(number), time.monotonic()


def _die_of(number: int) -> None:
    """Apply the signal's default action; a worker leaves Ctrl+C to its parent process."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Make the signals set the request instead of ending the program; has no effect outside the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
