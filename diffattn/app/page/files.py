"""The files that visitors see and download, and their deletion."""

import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any


class Files:
    """A page's folder inside Gradio's cache; its subfolders are deleted once they are old.

    Gradio's own `delete_cache` reaches uploads only: it forgets files as soon as a component is updated.

    Args:
        cache: Gradio's cache folder.
        seconds: age of its newest file at which a subfolder is deleted, on the next use; all are when the page ends.
    """

    def __init__(self, cache: Path, seconds: float) -> None:
        self._pages = cache / "diffattn"
        self._own = self._pages / secrets.token_hex(16)
        self._seconds = seconds

    def subfolder(self) -> Path:
        """Path of a new subfolder with a random name, for files to be deleted together; it is not created yet."""
        self._sweep()
        return self._own / secrets.token_hex(16)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Lifespan of the server; deletes the remaining files when it ends."""
        yield
        self._sweep()
        shutil.rmtree(self._own, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete old subfolders of this page, and of pages that ended without cleaning up."""
        oldest = time.time() - self._seconds
        for place in self._pages.glob("*/*"):
            with suppress(OSError):  # another page was faster
                if place.stat().st_mtime < oldest:
                    shutil.rmtree(place)
