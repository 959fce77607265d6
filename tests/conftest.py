"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that drive a real browser."""
    for item in items:
        if item.path.name.startswith("test_browser"):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session", autouse=True)
def _deterministic_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Callable[[str], DiffusionPipeline]:
    """kind -> a tiny pipeline, see `tiny.pipeline`."""
    return lambda kind: tiny.pipeline(kind, tmp_path / "tokenizer")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say aloud that tests of the page were skipped, and why: their number alone is easily overlooked."""
    found = set()
    for report in terminalreporter.stats.get("skipped", ()):
        if "app/page" in report.nodeid and isinstance(report.longrepr, tuple):
            what = "the page in a browser" if "browser" in report.nodeid else "the page"
            found.add(f"NOT TESTED: {what}: " + str(report.longrepr[2]).removeprefix("Skipped: "))
    for line in sorted(found):
        terminalreporter.write_line(line, yellow=True)
