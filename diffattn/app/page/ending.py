"""How a served page ends: within seconds, whatever is under way, and without leaving its visitors' files behind."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffattn.app.jobs import Worker
from diffattn.app.page.files import Files

GRACE_SECONDS = 1  # that open connections are given
STEP_SECONDS = 1.0  # that the step under way is given


@contextmanager
def terminated_like_interrupted(wanted: bool) -> Iterator[None]:
    """Within the block, if wanted, SIGTERM raises `KeyboardInterrupt` as Ctrl+C does; in the main thread only."""
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end(worker: Worker, files: Files) -> None:
    """Stop all jobs and delete all files.

    Ends the process if a step is still under way: Python would abort or hang at its own end, while PyTorch computes in
    another thread.
    """
    ended = worker.close(STEP_SECONDS)
    files.close()
    if not ended:
        os._exit(0)
