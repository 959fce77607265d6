"""Errors that reach visitors say names, and not where on the server things are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(place: str | Path, name: str) -> Iterator[None]:
    """Within, a `ValueError` that says a place on the server is raised with a name instead."""
    try:
        yield
    except ValueError as error:
        if str(place) not in str(error):
            raise
        raise ValueError(str(error).replace(str(place), name)) from error
