"""A page over tiny models, served on loopback, for the tests of the web page."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from diffattn.app.jobs import Limits, Models, Worker
from diffattn.sampling import SiTPipeline
from support import tiny
from support.tiny_dit import tiny_dit

CHROMIUM = os.environ.get("DIFFATTN_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
REQUIRED = os.environ.get("DIFFATTN_REQUIRE_WEB") == "1"


def need_gradio() -> None:
    """Skip the module without Gradio, unless the environment requires it."""
    if not REQUIRED:
        pytest.importorskip("gradio", reason="the web page needs Gradio: pip install 'diffattn[app]'")


def need_chromium() -> None:
    """Skip the module without Chromium, Playwright and axe, unless the environment requires them."""
    if not REQUIRED:
        pytest.importorskip("playwright", reason="the browser tests need Playwright: pip install playwright")
        pytest.importorskip("axe_playwright_python", reason="they need axe: pip install axe-playwright-python")
        if not Path(CHROMIUM).is_file():
            pytest.skip("the browser tests need Chromium: apt-get install chromium", allow_module_level=True)


def save_models(folder: Path, side: int = 32) -> Path:
    """Two tiny Stable Diffusion models, "one" and "group/two", that draw pictures of so many pixels a side.

    With 64 they have the tokens that acceleration takes.
    """
    pipe: Any = tiny.pipeline("sd", folder.parent / "tokenizer")
    pipe.unet.register_to_config(sample_size=side // pipe.vae_scale_factor)
    pipe.save_pretrained(folder / "one")
    shutil.copytree(folder / "one", folder / "group" / "two")
    return folder


def save_sits(folder: Path, *names: str) -> Path:
    """Tiny SiTs with mediators that draw 5 classes in 16x16 pixels, without a VAE: they load in no time."""
    pipe = SiTPipeline(tiny_dit(in_channels=3), FlowMatchEulerDiscreteScheduler(shift=1))
    for name in names:
        pipe.save_pretrained(folder / name)
    return folder


def tiny_worker(folder: Path, **limits: int) -> Worker:
    return Worker(Models(folder), Limits(**({"side": 64, "steps": 400, "images": 4, "prompt": 100} | limits)), "cpu")


def ask(worker: Worker, **changes: Any) -> Any:
    return worker.limits.request(**({"model": "one", "prompt": "a cat", "steps": 2, "acceleration": "none"} | changes))


def loaded(worker: Worker) -> Any:
    assert worker._loaded is not None
    return worker._loaded[1]


def traces_of_patching(pipe: Any) -> tuple[Any, ...]:
    processors = {name: type(p).__module__ for name, p in pipe.unet.attn_processors.items()}
    return len(pipe.unet._forward_pre_hooks), len(pipe.unet._forward_hooks), processors


@contextmanager
def served(worker: Worker) -> Iterator[str]:
    """The address of the page."""
    from diffattn.app.page import launch

    page, address = launch(worker, wait=False, warm_up=None)
    try:
        yield address
    finally:
        page.close()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until the condition holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
