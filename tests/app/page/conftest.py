"""Fixtures of the tests of the page; each module has its own `worker` or, in a browser, `site` (`support.browsing`)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import web

from diffattn.app.jobs import Worker


@pytest.fixture(scope="module")
def address(worker: Worker) -> Iterator[str]:
    """The address of a page over the module's worker."""
    with web.served(worker) as found:
        yield found


@pytest.fixture
def visit(site: Any) -> Iterator[Callable[..., Any]]:
    """Opens the module's page as another visitor, who is gone after the test."""
    with site.visitors() as opened:
        yield opened
