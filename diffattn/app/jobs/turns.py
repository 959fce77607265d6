"""One queue for the jobs of all visitors, which a waiting job can leave."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffattn.app.jobs.watch import Stopped

REPEAT_SECONDS = 5.0  # between reports of a waiting job, so that a listener that has gone is noticed


class Turns:
    """Runs one job at a time, in order of arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[object] = []  # the first has its turn

    def __len__(self) -> int:
        """The number of jobs running or waiting."""
        return len(self._line)

    @contextmanager
    def turn(self, stop: threading.Event, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait, then hold the turn.

        Args:
            stop: leave the queue once it is set; call `wake` to make that take effect immediately.
            waiting: called with the number of jobs ahead whenever it changes.

        Raises:
            Stopped: the job left the queue before its turn.
        """
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        try:
            with self._changed:
                while (ahead := self._line.index(ticket)) and not stop.is_set():
                    waiting(ahead)
                    self._changed.wait_for(lambda: stop.is_set() or self._line.index(ticket) != ahead, REPEAT_SECONDS)
            if stop.is_set():
                raise Stopped
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def wake(self) -> None:
        """Make waiting jobs check whether they have been stopped."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_none(self, timeout: float) -> bool:
        """Wait until no job is running or waiting; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._line, timeout)
