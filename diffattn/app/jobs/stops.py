"""The waiting and running jobs of all visitors: how many there may be, and how each is stopped."""

import threading
import time
from collections import Counter
from collections.abc import Hashable

from diffattn.app.jobs.visitor import Visitor


class Stopped(Exception):
    """The run was stopped by its user."""


class TooLong(ValueError):
    """A job took longer than is allowed."""


class Stop(threading.Event):
    """Ends one job once it is set, or once its time is up."""

    def __init__(self) -> None:
        super().__init__()
        self._ends = self._seconds = float("inf")

    def start_clock(self, seconds: float) -> None:
        """Start the job's clock; it may run for so many seconds."""
        self._seconds, self._ends = seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Raise `Stopped` if the job was stopped, `TooLong` if its time is up."""
        if self.is_set():
            raise Stopped
        if time.monotonic() > self._ends:
            raise TooLong(
                f"the job was ended after {self._seconds / 60:g} minutes, the limit here; use fewer steps, pictures or "
                "accelerations, or a smaller size"
            )


class Stops:
    """The jobs of all visitors, each with what stops it; for any number of threads.

    Args:
        most: jobs that one visitor may have at a time.
        of_owner: jobs of one user or network address, under any number of visitor names.
        in_all: jobs of all visitors together.
    """

    def __init__(self, most: int, of_owner: int | None = None, in_all: int | None = None) -> None:
        self.most = most
        self.of_owner = 4 * most if of_owner is None else of_owner
        self.in_all = 16 * most if in_all is None else in_all
        self._lock = threading.Lock()
        self._jobs: dict[Stop, Visitor] = {}
        self._all_stopped = False

    def add(self, session: Hashable | Visitor) -> Stop:
        """Add a job (already stopped after `stop_all`); raises `ValueError` if there are too many."""
        visitor, stop = Visitor.of(session), Stop()
        with self._lock:
            self._check(visitor)
            if self._all_stopped:
                stop.set()
            self._jobs[stop] = visitor
        return stop

    def _check(self, visitor: Visitor) -> None:
        names, owners = Counter(v.name for v in self._jobs.values()), Counter(v.owner for v in self._jobs.values())
        wait = "stop them, or wait for one to finish"
        if visitor.name is not None and names[visitor.name] >= self.most:
            raise ValueError(
                f"you already have {names[visitor.name]} jobs running or queued (limit {self.most}): {wait}"
            )
        if owners[visitor.owner] >= self.of_owner:
            raise ValueError(
                f"{owners[visitor.owner]} jobs of your user name or address are running or queued (limit "
                f"{self.of_owner}): {wait}"
            )
        if len(self._jobs) >= self.in_all:
            raise ValueError(f"the queue is full, with {len(self._jobs)} jobs: please try again in a few minutes")

    def discard(self, session: Hashable | Visitor, stop: Stop) -> None:
        """Remove a job that is over."""
        with self._lock:
            self._jobs.pop(stop, None)

    def stop(self, session: Hashable, tab: str | None = None) -> bool:
        """Stop the jobs of a session, or of one tab of its page. → whether there were any"""
        with self._lock:
            found = [stop for stop, visitor in self._jobs.items() if _is_of(visitor, session, tab)]
        for stop in found:
            stop.set()
        return bool(found)

    def has_jobs(self, session: Hashable, tab: str | None = None) -> bool:
        """Whether a session, or one tab of its page, has jobs that have not ended."""
        with self._lock:
            return any(_is_of(visitor, session, tab) for visitor in self._jobs.values())

    def stop_all(self) -> None:
        """Stop all jobs, and every one added later."""
        with self._lock:
            self._all_stopped = True
            found = list(self._jobs)
        for stop in found:
            stop.set()


def _is_of(visitor: Visitor, session: Hashable, tab: str | None) -> bool:
    return visitor.session == session and tab in (None, visitor.tab)
