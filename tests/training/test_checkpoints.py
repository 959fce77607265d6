"""Checkpoints: complete or absent, whatever happens while they are written."""

import random
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from support.full_disk import full_disk

from diffattn.training import checkpoints

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "random": checkpoints.random_states()}


def test_what_was_saved_comes_back(tmp_path) -> None:
    folder = checkpoints.save(tmp_path, 12, TENSORS, {"config": {"a": 1}}, keep=2)
    assert checkpoints.latest(tmp_path) == folder
    tensors, state = checkpoints.load(folder)
    assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"])
    assert state == {"config": {"a": 1}}
    assert tensors["ema"] == {}


def test_only_the_last_ones_are_kept_in_order_of_steps(tmp_path) -> None:
    for step in (5, 100, 9, 1000):
        checkpoints.save(tmp_path, step, TENSORS, {}, keep=2)
    assert [p.name for p in checkpoints.complete(tmp_path)] == ["step-00000100", "step-00001000"]


def test_incomplete_checkpoints_are_skipped(tmp_path) -> None:
    good = checkpoints.save(tmp_path, 1, TENSORS, {}, keep=3)
    broken = checkpoints.save(tmp_path, 2, TENSORS, {}, keep=3)
    (broken / checkpoints.COMPLETE).unlink()
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoints.latest(tmp_path) == good
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoints.load(broken)


def test_a_damaged_file_is_one_clear_error(tmp_path) -> None:
    folder = checkpoints.save(tmp_path, 1, TENSORS, {}, keep=1)
    (folder / "model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match=r"step-00000001.* cannot be read"):
        checkpoints.load(folder)


def test_no_checkpoint_yet(tmp_path) -> None:
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_a_full_disk_leaves_the_last_good_one(tmp_path) -> None:
    """Files may not grow beyond 4 KiB, which the system reports as it does a full disk: with an OSError."""
    good = checkpoints.save(tmp_path, 1, TENSORS, {}, keep=1)
    big = {"model": {"w": torch.zeros(100_000)}, "random": {}}
    with full_disk(4096), pytest.raises(OSError, match=r"^cannot write to '.*/step-00000002': File too large$"):
        checkpoints.save(tmp_path, 2, big, {}, keep=1)
    assert checkpoints.latest(tmp_path) == good
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from diffattn.training import checkpoints
step = 0
while True:
    step += 1
    w = torch.full((200_000,), float(step))
    checkpoints.save(Path(sys.argv[1]), step, {"model": {"w": w}, "ema": {"w": w}}, {"step": step}, keep=2)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_latest_is_whole(tmp_path) -> None:
    for delay in (0.013, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)])
        while checkpoints.latest(tmp_path) is None:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = checkpoints.latest(tmp_path)
        assert folder is not None
        tensors, state = checkpoints.load(folder)
        for part in ("model", "ema"):
            assert torch.equal(tensors[part]["w"], torch.full((200_000,), float(state["step"])))


KILLED_WHILE_REMOVING = """
import os, signal, sys, torch
from pathlib import Path
from diffattn.training import checkpoints
def save(root, step):
    w = torch.full((10,), float(step))
    checkpoints.save(root, step, {"model": {"w": w}}, {"step": step}, keep=2)
for kill_at in range(1, 8):
    root = Path(sys.argv[1], str(kill_at))
    for step in (1, 2, 3):
        save(root, step)
    child = os.fork()
    if not child:
        removed = []
        def look(event, arguments):
            if event == "os.remove":
                removed.append(arguments)
                if len(removed) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(look)
        save(root, int(sys.argv[2]))
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4], ids=["the same step again", "a new step, the oldest goes"])
def test_killed_while_a_checkpoint_is_removed_what_looks_complete_is(tmp_path, step) -> None:
    """The kill comes with the removal of the first, second, ... file, in whatever order the system lists them."""
    subprocess.run([sys.executable, "-c", KILLED_WHILE_REMOVING, str(tmp_path), str(step)], check=True)
    for root in tmp_path.iterdir():
        assert checkpoints.latest(root) == checkpoints.folder_of(root, step)
        for folder in checkpoints.complete(root):
            assert checkpoints.load(folder)[1]["step"] == int(folder.name.removeprefix("step-"))
        checkpoints.save(root, 5, TENSORS, {}, keep=1)
        assert [p.name for p in root.iterdir()] == ["step-00000005"]  # what the kill left is gone


def test_leftovers_go_when_the_next_save_begins(tmp_path) -> None:
    (tmp_path / ".writing-00000001").mkdir()
    unmarked = checkpoints.save(tmp_path, 2, TENSORS, {}, keep=9)
    (unmarked / checkpoints.COMPLETE).unlink()
    (tmp_path / "step-of-mine").mkdir()
    checkpoints.save(tmp_path, 3, TENSORS, {}, keep=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-of-mine"]


def test_random_states_come_back() -> None:
    before = checkpoints.random_states()
    first = (torch.rand(3), random.gauss(0, 1), numpy.random.randn(3))
    checkpoints.restore_random_states(before)
    again = (torch.rand(3), random.gauss(0, 1), numpy.random.randn(3))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert (first[2] == again[2]).all()
