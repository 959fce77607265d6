"""The events of a job on their way to whoever listens: progress may be skipped, results may not."""

import queue
import time
from typing import Any

from diffattn.app.jobs.watch import JobProgress


def latest(found: "queue.Queue[Any]", due: float) -> Any:
    """The next event. JobProgress waits until `due` (in `time.monotonic`) for newer progress, which takes its place."""
    event = found.get()
    while isinstance(event, JobProgress):
        try:
            newer = found.get(timeout=max(due - time.monotonic(), 0))
        except queue.Empty:
            break
        if not isinstance(newer, JobProgress):
            with found.mutex:
                found.queue.appendleft(newer)  # its turn comes next: nobody else takes from this queue
            break
        event = newer
    return event
