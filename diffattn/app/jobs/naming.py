"""Errors shown to visitors contain names, never paths on the server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(place: str | Path, name: str) -> Iterator[None]:
    """Within the block, a `ValueError` whose message contains a server path is re-raised with a name instead."""
    try:
        yield
    except ValueError as error:
        if str(place) not in str(error):
            raise
        raise ValueError(str(error).replace(str(place), name)) from error
