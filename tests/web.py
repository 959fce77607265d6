"""A page over tiny models, served on loopback, for the tests of the web page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny

from diffattn.jobs import Limits, Models, Worker

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
REQUIRED = os.environ.get("DIFFATTN_REQUIRE_WEB") == "1"


def need_gradio() -> None:
    """Skip the module without Gradio, unless the environment requires it."""
    if not REQUIRED:
        pytest.importorskip("gradio", reason="the web page needs Gradio: pip install 'diffattn[app]'")


def need_chromium() -> None:
    """Skip the module without Chromium and Playwright, unless the environment requires them."""
    if not REQUIRED:
        pytest.importorskip("playwright", reason="the browser tests need Playwright: pip install playwright")
        if not Path(CHROMIUM).is_file():
            pytest.skip("the browser tests need Chromium: apt-get install chromium", allow_module_level=True)


def save_models(folder: Path) -> Path:
    """Two tiny Stable Diffusion models, "one" and "group/two"."""
    pipe = tiny.pipeline("sd", folder.parent / "tokenizer")
    pipe.save_pretrained(folder / "one")
    shutil.copytree(folder / "one", folder / "group" / "two")
    return folder


def tiny_worker(folder: Path, **limits: int) -> Worker:
    return Worker(Models(folder), Limits(**({"side": 64, "steps": 400, "images": 4, "prompt": 100} | limits)), "cpu")


@contextmanager
def served(worker: Worker) -> Iterator[str]:
    """The address of the page."""
    from diffattn.webui import launch

    page, address = launch(worker, wait=False, warm_up=None)
    try:
        yield address
    finally:
        page.close()
