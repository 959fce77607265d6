"""Fixtures of the tests in a browser; each module has its own `site`, see `support.browsing`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def visit(site: Any) -> Iterator[Callable[..., Any]]:
    """Opens the module's page as another visitor, who is gone after the test."""
    with site.visitors() as opened:
        yield opened
