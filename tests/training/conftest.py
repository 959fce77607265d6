"""Shared by the tests of training."""

from pathlib import Path

import pytest
from support.tiny_training import make_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))
