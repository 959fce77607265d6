"""A full disk: files that may not grow, which the system reports as it does a disk without space."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def limited(most: int = 512) -> None:
    """From here on, no file of this process grows beyond so many bytes; also for `preexec_fn`."""
    resource = pytest.importorskip("resource")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full_disk(most: int = 512) -> Iterator[None]:
    """The same within the block."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    limited(most)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
