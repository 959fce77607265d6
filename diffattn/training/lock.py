"""A lock that allows one training per run folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from diffattn.files import read_json, write_json
from diffattn.training.setup import Say

LOCK, OWNER = ".lock", ".running.json"


@contextmanager
def locked(folder: Path, say: Say) -> Iterator[None]:
    """Lock a run's folder, creating it if necessary.

    The operating system releases the lock when its process ends, however it ends, so a killed run blocks nothing.

    Args:
        folder: of the run.
        say: prints a line if the folder's file system has no locks, so that nothing can be checked.

    Raises:
        ValueError: another training holds it; the message names its process, machine and start.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"run.out={str(folder)!r} is in use by another training, {_owner(folder)}; "
            "stop that one, wait for it, or choose another run.out"
        ) from None
    except NotImplementedError:
        say(f"{folder} is on a file system without locks; make sure that no other training uses it")
        yield
        return
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: the owner is only for the message
            write_json(folder / OWNER, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / OWNER)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError):
        return "which has not recorded its identity"
