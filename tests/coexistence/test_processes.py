"""Two processes on CPUs (gloo): each with its own pictures, or together on each picture."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import two_processes
from support.coexistence import Subject, agree, coexists, differ
from support.two_processes import PROMPTS

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes of `support.two_processes` found."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, two_processes.__file__, str(folder)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def name_of(subject: Subject) -> str:
    return type(subject.denoiser).__name__


@coexists(
    "two processes",
    "prompts shared between them by accelerate",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the pictures of one process",
)
def test_prompts_are_shared(subject: Subject, found: list[dict[str, Any]]) -> None:
    with subject.patch():
        alone = [subject.draw(prompt=prompt) for prompt in PROMPTS]
    for drawn in (process[f"share {name_of(subject)}"] for process in found):
        for one, other in zip(drawn, alone, strict=True):
            agree(one, other)


@coexists(
    "FSDP2",
    "`fully_shard` before and after the patch, in two processes",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the pictures of the patch in one process; removed, the unpatched ones, bit for bit",
)
def test_sharded(subject: Subject, found: list[dict[str, Any]]) -> None:
    exact, accelerated = subject.draw(), subject.draw_patched()
    for sharded in (process[f"shard {name_of(subject)}"] for process in found):
        agree(sharded["exact"], exact)
        agree(sharded["accelerated"], accelerated)
        agree(sharded["patched before"], accelerated)
        assert sharded["layers"] == (subject.num_layers,) * 3
        assert sharded["restored"]


@coexists(
    "context parallel",
    "`enable_parallelism` after the patch, in two processes",
    on=["FluxTransformer2DModel", "WanTransformer3DModel"],
    holds="every layer runs exact, with a warning, and the report says why",
)
def test_context_parallel(subject: Subject, found: list[dict[str, Any]]) -> None:
    exact = subject.draw()
    for split in (process[f"split {name_of(subject)}"] for process in found):
        assert split["accelerated"] == 0
        assert split["reasons"] == {"context parallel: its tokens are split between processes"}
        assert len(split["warned"]) == 1
        assert "accelerates no layer in this run: context parallel" in split["warned"][0]
        assert torch.equal(split["patched"], split["exact"])
        agree(split["exact"], exact)
        differ(split["exact"], subject.draw_patched())
