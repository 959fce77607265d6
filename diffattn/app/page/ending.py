"""How a served page shuts down: within seconds, whatever is running, and without leaving its visitors' files behind."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.page.files import Files

GRACE_SECONDS = 1  # that open connections are given
STEP_SECONDS = 1.0  # that the step under way is given


@contextmanager
def terminated_like_interrupted(wanted: bool) -> Iterator[None]:
    """Within the block, if requested, SIGTERM raises `KeyboardInterrupt` as Ctrl+C does; in the main thread only."""
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


def end(page: gr.Blocks, worker: Worker, files: Files) -> None:
    """Stop all jobs, close the server, and delete all files, without waiting longer than `STEP_SECONDS` for a step and
    `GRACE_SECONDS` for connections."""
    closing = threading.Thread(target=page.close, kwargs={"verbose": False}, name="diffattn-closing", daemon=True)
    closing.start()
    worker.close(STEP_SECONDS)
    closing.join(GRACE_SECONDS)
    files.close()


def leave() -> NoReturn:
    """End the process at once: Python's own shutdown takes seconds, and aborts or hangs while PyTorch computes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
