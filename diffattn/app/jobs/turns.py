"""One queue for the jobs of all visitors, fair between them, which a waiting job can leave."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffattn.app.jobs.stops import Stopped
from diffattn.app.jobs.visitor import Visitor

REPEAT_SECONDS = 5.0  # between reports of a waiting job, so that a listener that has gone is noticed
REMEMBERED = 1024  # owners and names whose last turn is known


@dataclass(frozen=True, eq=False)
class _Ticket:
    visitor: Visitor


@dataclass
class _Served:
    """When each visitor had their last turn, counted in turns."""

    turn: Iterator[int] = field(default_factory=itertools.count)
    last: "OrderedDict[Hashable, int]" = field(default_factory=OrderedDict)

    def keys(self, visitor: Visitor) -> tuple[Hashable, Hashable]:
        return ("owner", visitor.owner), ("name", visitor.owner, visitor.name or visitor.session)

    def note(self, visitor: Visitor) -> None:
        now = next(self.turn)
        for key in self.keys(visitor):
            self.last[key] = now
            self.last.move_to_end(key)
        while len(self.last) > REMEMBERED:
            self.last.popitem(last=False)

    def rank(self, visitor: Visitor) -> tuple[int, int]:
        owner, name = self.keys(visitor)
        return self.last.get(owner, -1), self.last.get(name, -1)


class Turns:
    """Runs one job at a time.

    Next is the user or address whose last turn is longest ago; of theirs, the visitor whose last turn is longest ago;
    and of theirs, the oldest job. Twenty jobs of one visitor thus do not hold up another's single job.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: _Ticket | None = None
        self._waiting: list[_Ticket] = []  # in order of arrival
        self._served = _Served()

    def __len__(self) -> int:
        """The number of jobs running or waiting."""
        return len(self._waiting) + (self._running is not None)

    @contextmanager
    def turn(
        self, stop: threading.Event, waiting: Callable[[int], None], session: Hashable | Visitor = None
    ) -> Iterator[None]:
        """Wait, then hold the turn.

        Args:
            stop: leave the queue once it is set; call `wake` to make that take effect immediately.
            waiting: called with the number of jobs ahead whenever it changes.
            session: whose job it is.

        Raises:
            Stopped: the job left the queue before its turn.
        """
        ticket = _Ticket(Visitor.of(session))
        try:
            with self._changed:
                self._waiting.append(ticket)
                while (ahead := self._ahead(ticket)) and not stop.is_set():
                    waiting(ahead)
                    self._changed.wait_for(lambda: stop.is_set() or self._ahead(ticket) != ahead, REPEAT_SECONDS)
                if stop.is_set():
                    raise Stopped
                self._waiting.remove(ticket)
                self._running = ticket
                self._served.note(ticket.visitor)
            yield
        finally:
            with self._changed:
                if self._running is ticket:
                    self._running = None
                else:
                    self._waiting.remove(ticket)
                self._changed.notify_all()

    def _ahead(self, ticket: _Ticket) -> int:
        """How many jobs currently come before this one."""
        return (self._running is not None) + self._order().index(ticket)

    def _order(self) -> Sequence[_Ticket]:
        """The waiting jobs in the order in which they will run, if none is added."""
        served, left, found = _Served(itertools.count(10**9), self._served.last.copy()), list(self._waiting), []
        while left:
            first = min(left, key=lambda ticket: served.rank(ticket.visitor))
            left.remove(first)
            found.append(first)
            served.note(first.visitor)
        return found

    def wake(self) -> None:
        """Make waiting jobs check whether they have been stopped."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_none(self, timeout: float) -> bool:
        """Wait until no job is running or waiting; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not len(self), timeout)
