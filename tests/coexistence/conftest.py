"""The subject of a test of coexistence."""

from pathlib import Path

import pytest
from support.coexistence import Subject, make


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    """A tiny pipeline or model of the class that the test names, see `support.coexistence.coexists`."""
    return make(request.param, tmp_path / "tokenizer")
