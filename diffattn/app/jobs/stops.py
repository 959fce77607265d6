"""The jobs of every visitor, waiting or running, and how each is stopped."""

import threading
from collections.abc import Hashable


class Stops:
    """The jobs of every session, each with the event that stops it; for any number of threads.

    Args:
        most: jobs that one session may have at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._events: dict[Hashable, set[threading.Event]] = {}
        self._all_stopped = False

    def add(self, session: Hashable) -> threading.Event:
        """Add a job (already stopped after `stop_all`); raises `ValueError` if the session has reached its limit."""
        with self._lock:
            own = self._events.get(session, set())
            if len(own) >= self.most:
                raise ValueError(
                    f"you already have {len(own)} jobs running or queued (limit {self.most}): stop them, or wait for "
                    "one to finish"
                )
            stop = threading.Event()
            if self._all_stopped:
                stop.set()
            self._events[session] = own | {stop}
        return stop

    def discard(self, session: Hashable, stop: threading.Event) -> None:
        """Remove a job that is over."""
        with self._lock:
            left = self._events.get(session, set()) - {stop}
            if left:
                self._events[session] = left
            else:
                self._events.pop(session, None)

    def stop(self, session: Hashable) -> bool:
        """Set the events of a session. → whether there were any"""
        with self._lock:
            found = self._events.get(session, set())
        for event in found:
            event.set()
        return bool(found)

    def has_jobs(self, session: Hashable) -> bool:
        """Whether a session has jobs that have not ended."""
        with self._lock:
            return bool(self._events.get(session))

    def stop_all(self) -> None:
        """Set the events of all sessions, and of every job added later."""
        with self._lock:
            self._all_stopped = True
            found = [event for events in self._events.values() for event in events]
        for event in found:
            event.set()
