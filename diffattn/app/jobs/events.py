"""The events of a job on their way to its listener: progress may be skipped, results may not."""

import queue
import time
from typing import Any

from diffattn.app.jobs.watch import JobProgress


def latest(found: "queue.Queue[Any]", due: float) -> Any:
    """The next event. Progress is withheld until `due` (by `time.monotonic`), and newer progress replaces it."""
    event = found.get()
    while isinstance(event, JobProgress):
        try:
            newer = found.get(timeout=max(due - time.monotonic(), 0))
        except queue.Empty:
            break
        if not isinstance(newer, JobProgress):
            with found.mutex:
                found.queue.appendleft(newer)  # it comes next, since this is the queue's only reader
            break
        event = newer
    return event
