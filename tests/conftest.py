"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline


@pytest.fixture(scope="session", autouse=True)
def _deterministic_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Callable[[str], DiffusionPipeline]:
    """kind -> a tiny pipeline: sd, sdxl, img2img, inpaint or controlnet."""
    return lambda kind: tiny.pipeline(kind, tmp_path / "tokenizer")
