"""The files that visitors see, download and upload, and their deletion."""

import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"  # held while the page of a folder is served
QUOTA = 2**30  # bytes


class Files:
    """A page's folder inside Gradio's cache; its subfolders are deleted once they are old.

    Gradio's own `delete_cache` forgets files as soon as a component is updated.

    Args:
        cache: Gradio's cache folder.
        seconds: age of its newest file at which a subfolder is deleted, on the next use; all are when the page ends.
        quota: bytes of all files together; the oldest subfolders are deleted first.
    """

    def __init__(self, cache: Path, seconds: float, quota: int = QUOTA) -> None:
        self._pages = cache / "diffattn"
        self.folder = self._pages / secrets.token_hex(16)
        self._seconds, self._quota = seconds, quota
        self._lock = FileLock(self.folder / LOCK)

    def open(self) -> None:
        """Create the folder, and delete those of pages that ended without cleaning up, such as after a kill."""
        self.folder.mkdir(parents=True)
        self._lock.acquire()
        for place in self._pages.iterdir():
            if place != self.folder and (place / LOCK).is_file():
                with suppress(Timeout, OSError), FileLock(place / LOCK, timeout=0):
                    shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def subfolder(self) -> Path:
        """Path of a new subfolder with a random name, for files to be deleted together; it is not created yet."""
        self.make_room()
        return self.folder / secrets.token_hex(16)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Lifespan of the server; deletes the remaining files when it ends."""
        yield
        self.close()

    def make_room(self) -> None:
        """Delete old subfolders, then the oldest ones until all files fit into the quota."""
        oldest, kept = time.time() - self._seconds, list[tuple[float, int, Path]]()
        for place in self.folder.glob("*/"):
            with suppress(OSError):  # another request was faster
                changed = place.stat().st_mtime
                if changed < oldest:
                    shutil.rmtree(place)
                else:
                    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                    kept.append((changed, size, place))
        total = sum(size for _, size, _ in kept)
        for _, size, place in sorted(kept):
            if total <= self._quota:
                break
            shutil.rmtree(place, ignore_errors=True)
            total -= size
