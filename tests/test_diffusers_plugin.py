"""The plugin that runs diffusers' own tests with the denoiser patched, on a checkout of three tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import diffusers_plugin

ROOT = Path(__file__).parents[1]
TESTS = """
import sys
sys.path.insert(0, {tests!r})

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from support import tiny

def processors(pipe):
    return [block.attn1.processor for block in pipe.transformer.transformer_blocks]

def test_draws(tmp_path):
    pipe = tiny.pipeline("dit", tmp_path)
    tiny.run(pipe)

def test_that_nothing_is_replaced(tmp_path):
    pipe = tiny.pipeline("dit", tmp_path)
    tiny.run(pipe)
    assert all(type(p) is AttnProcessor2_0 for p in processors(pipe))

@pytest.mark.skip(reason="needs an accelerator")
def test_elsewhere():
    pass
"""


def run(folder: Path, *options: str) -> dict[str, Any]:
    """What the plugin writes after a run of the tests of a checkout."""
    path = [str(ROOT), str(ROOT / "tests" / "support")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "diffusers_plugin", *options]
    subprocess.run(
        [*command, "--diffattn-counts", "counts.json", "tests"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTEST_ADDOPTS": ""},
        check=False,
        capture_output=True,
    )
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.slow
def test_outcomes_and_accelerated_calls_are_written_and_compared(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_dit.py").write_text(TESTS.format(tests=str(ROOT / "tests")))
    unpatched, patched = run(tmp_path, "--diffattn-unpatched"), run(tmp_path)
    assert unpatched["outcomes"] == {"passed": 2, "skipped": 1}
    assert unpatched["accelerated"] == 0
    assert patched["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert patched["accelerated"] == 2 * 2 * 4  # tests, layers, steps
    lines = diffusers_plugin.compare(unpatched, patched)
    assert lines[0] == "2 tests pass unpatched; 2 of them were run patched, 1 pass"
    assert lines[1] == "16 calls of layers were accelerated, in 2 tests"
    assert lines[2].startswith("fails patched: tests/test_dit.py::test_that_nothing_is_replaced: ")
