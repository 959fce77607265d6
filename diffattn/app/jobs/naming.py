"""Errors shown to visitors give names, never paths on the server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(place: str | Path, name: str) -> Iterator[None]:
    """Within, a `ValueError` whose message holds a path on the server is raised with a name in its place."""
    try:
        yield
    except ValueError as error:
        if str(place) not in str(error):
            raise
        raise ValueError(str(error).replace(str(place), name)) from error
