"""A full disk: files that may not grow, which the system reports as it does a disk without space."""

import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from support.full_disk import full_disk, limited
from support.tiny_training import TINY, run

from diffattn.training import checkpoints

PROGRAM = Path(__file__).parents[2] / "pipelines/train.py"


def test_grids_figures_and_checkpoints_that_cannot_be_written_do_not_end_a_run(pictures, tmp_path) -> None:
    said: list[str] = []
    settings = ["run.sample_every=2", "run.sample_steps=1", 'run.trackers=["tensorboard"]', "run.log_every=1",
                "run.save_every=2", "run.steps=6", "objective.bins=20"]  # fmt: skip
    run(pictures, tmp_path, *settings, "run.steps=1")
    newest = checkpoints.latest(tmp_path / "checkpoints")
    assert newest is not None
    (newest / checkpoints.COMPLETE).unlink()
    with full_disk(), pytest.raises(OSError, match="File too large"):  # the last checkpoint
        run(pictures, tmp_path, *settings, said=said)
    assert any(line.startswith("samples of step 4 not written: ") for line in said)
    assert any(line.startswith("checkpoint at step 4 not written: ") for line in said)
    assert all(line.endswith("there is no checkpoint yet") for line in said if line.startswith("checkpoint at"))
    assert sum("tensorboard failed and is disabled from here on" in line for line in said) <= 1
    assert any(line.startswith("step 6/6") for line in said)


def test_latents_that_cannot_be_written_end_with_one_sentence(pictures, tmp_path) -> None:
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    command = [sys.executable, str(PROGRAM), "--data", str(pictures), "--out", str(tmp_path / "out"), *TINY]
    done = subprocess.run(
        [*command, "--device", "cpu", f"data.vae={tmp_path / 'vae'}", "data.size=16"],
        capture_output=True, text=True, timeout=300, preexec_fn=limited,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffattn: the latents could not be written to ")
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_pipeline_that_cannot_be_written_is_exported_by_the_same_command_later(pictures, tmp_path) -> None:
    run(pictures, tmp_path, "run.steps=2")
    before = (tmp_path / "pipeline/model_index.json").read_text()
    with full_disk(), pytest.raises(OSError, match="pipeline could not be written"):
        run(pictures, tmp_path, "run.steps=2")
    assert (tmp_path / "pipeline/model_index.json").read_text() == before
    run(pictures, tmp_path, "run.steps=2")
    assert sorted(p.name for p in tmp_path.iterdir() if "pipeline" in p.name) == ["pipeline"]


def test_a_closed_standard_output_does_not_end_a_run(pictures, tmp_path) -> None:
    command = [sys.executable, str(PROGRAM), "--data", str(pictures), "--out", str(tmp_path), "--device", "cpu", *TINY]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (tmp_path / "pipeline/model_index.json").is_file(), done.stderr
