"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from support import tiny

os.environ["DIFFATTN_CALIBRATE"] = "0"  # pictures of tests must not depend on the clock, nor on a user's cache

SLOW = {
    "app/jobs/test_jobs.py", "app/jobs/test_limits.py", "app/jobs/test_no_picture.py", "app/jobs/test_quality.py",
    "app/jobs/test_stop.py", "app/page/test_page.py", "app/page/test_quality.py", "app/page/test_shared_use.py",
    "app/page/test_skipped.py", "architectures/test_memory.py", "architectures/test_own_dit.py",
    "benchmarks/test_mediators.py", "cli/test_app.py", "cli/test_tune.py", "coexistence/test_caches.py",
    "coexistence/test_compile_blocks.py", "coexistence/test_processes.py", "methods/test_contract.py",
    "patching/test_compile.py", "pipelines/test_compare_linear.py", "pipelines/test_compare_mediators.py",
    "pipelines/test_compare_peers.py", "pipelines/test_gpu_day.py", "pipelines/test_page_programs.py",
    "pipelines/test_peers.py", "pipelines/test_precompute_page.py", "pipelines/test_train_emoji_sd.py", "test_docs.py",
    "training/test_distributed.py", "training/test_full_disk.py", "training/test_killed.py", "training/test_loop.py",
    "training/test_options.py", "training/test_processes.py", "training/test_stops.py", "tuning/test_presets.py",
    "tuning/test_tune.py",
}  # fmt: skip
"""Files that take longest: compilation, processes, a server, programs, memory, every method on every pipeline."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that drive a real browser, and those of slow files."""
    for item in items:
        if item.path.name.startswith("test_browser"):
            item.add_marker(pytest.mark.browser)
        if item.path.relative_to(config.rootpath / "tests").as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _deterministic_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _own_attention_backend() -> Iterator[None]:
    """`set_attention_backend` of a model also sets diffusers' default for the whole process."""
    with attention_backend("native"):
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled or counted yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


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
