"""A killed training process resumes as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from support.tiny_training import TINY, assert_same, last, make_pictures, run

from diffattn.training import checkpoints

PROGRAM = Path(__file__).parents[2] / "pipelines/train.py"


def test_a_killed_process_goes_on_and_equals_the_uninterrupted_run(tmp_path) -> None:
    (tmp_path / "pictures").mkdir()
    pictures, out = make_pictures(tmp_path / "pictures"), tmp_path / "killed"
    command = [sys.executable, str(PROGRAM), "--data", str(pictures), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen([*command, *TINY, "run.steps=1000000"], stdout=subprocess.DEVNULL)
    try:
        while checkpoints.latest(out / "checkpoints") is None:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = last(out)[1]["progress"]["step"] + 4
    said: list[str] = []
    run(pictures, out, f"run.steps={steps}", said=said)
    assert f"resuming at step {steps - 4}" in said
    run(pictures, tmp_path / "whole", f"run.steps={steps}")
    assert_same(tmp_path / "whole", out)
