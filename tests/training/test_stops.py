"""A training that is asked to stop, a folder that is in use, and checkpoints that a disk has damaged."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_training import TINY, assert_same, last, run

from diffattn.data import ImageDataset
from diffattn.training import checkpoints
from diffattn.training.signals import Stopped, StopRequest, listening

PROGRAM = Path(__file__).parents[2] / "pipelines/train.py"


def started(pictures: Path, out: Path, *settings: str, until: str = "step 4/") -> subprocess.Popen[str]:
    """A training process that has printed a line that begins so."""
    command = [sys.executable, str(PROGRAM), "--data", str(pictures), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *TINY, "run.steps=1000000", "run.save_every=1000000", *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_a_signal_saves_a_checkpoint_says_so_and_the_run_resumes(pictures, tmp_path, number, code) -> None:
    out = tmp_path / "out"
    process = started(pictures, out)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == ""
    step = last(out)[1]["progress"]["step"]
    folder = checkpoints.folder_of(out / "checkpoints", step)
    assert f"stopped by {number.name} at step {step}; checkpoint saved to {folder}" in said
    if number == signal.SIGTERM:
        run(pictures, out, f"run.steps={step + 2}")
        run(pictures, tmp_path / "whole", f"run.steps={step + 2}")
        assert_same(out, tmp_path / "whole")


def test_signals_are_heard_only_while_a_run_lasts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.note
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_repeated_ctrl_c_ends_at_once_but_not_the_one_that_a_launcher_repeats(monkeypatch) -> None:
    stop = StopRequest()
    stop.note(signal.SIGINT)
    stop.note(signal.SIGINT)
    monkeypatch.setattr("diffattn.training.signals.PATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT)


def test_a_stop_whose_checkpoint_cannot_be_written_says_what_is_there(pictures, tmp_path, monkeypatch) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    monkeypatch.setattr("diffattn.training.signals.StopRequest.__init__", lambda self: setattr(self, "signal", 15))
    with pytest.raises(Stopped, match=r"SIGTERM at step 1, whose checkpoint could not be written: .*no checkpoint yet"):
        run(pictures, tmp_path, "data.in_memory=false")


def test_a_folder_in_use_is_refused_and_names_who_uses_it(pictures, tmp_path) -> None:
    process = started(pictures, tmp_path)
    try:
        who = rf"in use by another training, process {process.pid} on {re.escape(socket.gethostname())}, since "
        with pytest.raises(ValueError, match=who):
            run(pictures, tmp_path)
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / ".running.json").read_text())["pid"] == process.pid  # what the kill left
    run(pictures, tmp_path, "run.steps=2")  # is taken over
    assert not (tmp_path / ".running.json").exists()


def zero(path: Path) -> None:
    """The last bytes of a file are lost."""
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


def test_lost_bytes_are_noticed_and_the_older_checkpoint_is_offered(pictures, tmp_path) -> None:
    run(pictures, tmp_path, "run.steps=6")
    newest = checkpoints.folder_of(tmp_path / "checkpoints", 6)
    for name in checkpoints.TENSORS:
        file = newest / f"{name}.safetensors"
        whole = file.read_bytes()
        zero(file)
        with pytest.raises(ValueError, match=r"step-00000006' is damaged .*step-00000003 is intact: delete .*step 3"):
            run(pictures, tmp_path)
        file.write_bytes(whole)
    (newest / checkpoints.STATE).write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"step-00000006' is damaged and cannot be read: .*step-00000003 is intact"):
        run(pictures, tmp_path)
    zero(checkpoints.folder_of(tmp_path / "checkpoints", 3) / "ema.safetensors")
    with pytest.raises(ValueError, match=r"step-00000006' is damaged .*no older checkpoint is intact"):
        run(pictures, tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_a_row_for_the_null_class(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "new", "objective.label_dropout=0", "run.steps=3")
    folder = checkpoints.latest(tmp_path / "new/checkpoints")
    assert folder is not None
    tensors, state = checkpoints.load(folder)
    for part in tensors.values():
        for name, tensor in part.items():
            if "y_embedder.embedding_table" in name and tensor.ndim == 2:
                part[name] = torch.cat([tensor, torch.randn(1, tensor.shape[1])])
    old = checkpoints.save(tmp_path / "old/checkpoints", 3, tensors, state, keep=1)
    plain = json.loads((old / checkpoints.STATE).read_text())
    plain.pop(checkpoints.CHECKSUMS)
    (old / checkpoints.STATE).write_text(json.dumps(plain))
    for name in ("new", "old"):
        run(pictures, tmp_path / name, "objective.label_dropout=0", "run.steps=5")
    assert_same(tmp_path / "new", tmp_path / "old")


def test_a_signal_while_pictures_are_decoded_ends_the_run(pictures, tmp_path, monkeypatch) -> None:
    original = ImageDataset.__getitem__

    def item(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", item)
    with pytest.raises(Stopped, match="SIGTERM while pictures were decoded; there was nothing to save"):
        run(pictures, tmp_path)
    assert not (tmp_path / ".running.json").exists()
