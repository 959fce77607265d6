"""Two processes of one run: they agree on where to resume, share the work, and end together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from support.tiny_training import TINY, last, run

from diffattn.training import checkpoints
from diffattn.training.latents import LatentDataset

PROGRAM = Path(__file__).parents[2] / "pipelines/train.py"

LOCAL_DISKS = """
import os, runpy, sys
rank = os.environ["RANK"]
sys.argv = [argument.replace("RANK", rank) for argument in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SLOW_LATENTS = """
import runpy, sys, time
from diffattn.training import encode
from diffattn.training.samples import Grid
original, draw = encode._moments, Grid.draw
def slow(vae, x):
    time.sleep(0.4)
    return original(vae, x)
def slow_draw(self, *given):
    time.sleep(1)
    return draw(self, *given)
encode._moments, Grid.draw = slow, slow_draw
encode.Encoding.__init__.__defaults__ = (2, "cpu", 4, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(folder: Path, pictures: Path, out: str, *settings: str, wrapper: str = LOCAL_DISKS) -> list[str]:
    """The training program in two processes; "RANK" in an argument becomes the process's number."""
    script = folder / "wrapper.py"
    script.write_text(wrapper)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    return [*launch, str(PROGRAM), "--data", str(pictures), "--out", out, "--device", "cpu", *TINY, *settings]


def launched(*given, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*given, **more), capture_output=True, text=True, timeout=300)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that the program itself ends with."""
    return [line for line in done.stderr.splitlines() if line.startswith("diffattn:")]


def test_local_disks_cannot_resume_and_every_process_ends_with_one_message(pictures, tmp_path) -> None:
    for rank, steps in ((0, 6), (1, 3)):
        run(pictures, tmp_path / f"out-{rank}", f"run.steps={steps}")
    done = launched(tmp_path, pictures, f"{tmp_path}/out-RANK")
    assert done.returncode != 0
    (message,) = messages(done)
    assert "disagree about the checkpoint to resume from (step-00000006, weights " in message
    assert "no step-00000006, the newest is step-00000003 on process 1" in message
    assert "folder that all machines share" in message
    assert last(tmp_path / "out-0")[1]["progress"]["step"] == 6  # nobody trained on
    assert last(tmp_path / "out-1")[1]["progress"]["step"] == 3


def test_a_checkpoint_that_only_another_process_sees_is_not_ignored(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "out-1", "run.steps=3")
    done = launched(tmp_path, pictures, f"{tmp_path}/out-RANK")
    assert done.returncode != 0
    (message,) = messages(done)
    assert "(none on process 0; step-00000003, weights " in message
    assert checkpoints.latest(tmp_path / "out-0/checkpoints") is None


def test_equal_steps_of_different_weights_are_refused(pictures, tmp_path) -> None:
    for rank in (0, 1):
        run(pictures, tmp_path / f"out-{rank}", "run.steps=3", f"run.seed={rank}")
    done = launched(tmp_path, pictures, f"{tmp_path}/out-RANK", "run.seed=0")
    assert done.returncode != 0
    assert messages(done)[0].count("step-00000003, weights ") == 2


def test_different_commands_and_pictures_are_refused(pictures, tmp_path) -> None:
    done = launched(tmp_path, pictures, str(tmp_path / "out"), "run.seed=RANK")
    assert done.returncode != 0
    (message,) = messages(done)
    assert "disagree about the configuration (" in message
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_shared_work_outlasts_the_timeout(pictures, tmp_path) -> None:
    """Encoding takes 5 s in all and the grids 12 s, with 3 s of patience between the processes."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    settings = [f"data.vae={tmp_path / 'vae'}", "data.size=16", "run.steps=4", "run.sample_every=2",
                "run.sample_steps=1", "run.timeout_minutes=0.05"]  # fmt: skip
    done = launched(tmp_path, pictures, str(tmp_path / "out"), *settings, wrapper=SLOW_LATENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(LatentDataset(tmp_path / "out/latents")) == 10
    assert len(list((tmp_path / "out/latents").glob("shard-*"))) == 3
    run(pictures, tmp_path / "one", *settings)
    (tmp_path / "one/samples/step-00000002.png").stat()
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 2


def test_latents_on_local_disks_are_encoded_by_each(pictures, tmp_path) -> None:
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    settings = [f"data.vae={tmp_path / 'vae'}", "data.size=16", "run.steps=1", f"data.cache={tmp_path}/cache-RANK"]
    done = launched(tmp_path, pictures, str(tmp_path / "out"), *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert len(LatentDataset(tmp_path / f"cache-{rank}")) == 10


def test_a_signal_to_one_process_stops_all_at_one_step(pictures, tmp_path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(tmp_path, pictures, str(out), "run.steps=1000000", "run.save_every=1000000"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.send_signal(signal.SIGTERM)  # the launcher hands it on
    said = process.stdout.read()
    assert process.wait(60) != 0
    step = last(out)[1]["progress"]["step"]
    assert f"stopped by SIGTERM at step {step}; checkpoint saved to" in said
    run(pictures, out, f"run.steps={step + 2}")
    run(pictures, tmp_path / "whole", f"run.steps={step + 2}")
    tensors, other = last(out)[0]["model"], last(tmp_path / "whole")[0]["model"]
    assert all(torch.allclose(tensors[name], other[name], atol=1e-2) for name in tensors)


def test_the_quality_of_two_processes_is_that_of_one(pictures, tmp_path) -> None:
    settings = ["run.steps=2", "run.eval_every=2", "run.eval_samples=10", "run.sample_steps=2", "run.timeout_minutes=1"]
    done = launched(tmp_path, pictures, str(tmp_path / "two"), *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    how = "FlowMatchEulerDiscreteScheduler, 2 steps, guidance 1"
    assert f"FID-10 (cifar-classifier, {how}) of step 2: n=1: " in done.stdout
    run(pictures, tmp_path / "one", *settings)
    two, one = (json.loads((tmp_path / name / "quality.jsonl").read_text()) for name in ("two", "one"))
    assert (one["sampler"], one["steps"], one["guidance"]) == ("FlowMatchEulerDiscreteScheduler", 2, 1.0)
    for n in ("n=1", "n=4"):
        assert two["scores"][n]["fid"] == pytest.approx(one["scores"][n]["fid"], rel=0.02)


def test_a_loss_that_is_never_finite_ends_every_process_with_one_sentence(pictures, tmp_path) -> None:
    done = launched(tmp_path, pictures, str(tmp_path / "out"), "optim.lr=1e30", "optim.clip=0", "run.steps=60",
                    "run.max_bad_steps=2")  # fmt: skip
    assert done.returncode != 0
    (message,) = messages(done)
    assert "loss or gradient not finite in 2 steps in a row" in message


def test_latents_that_one_process_cannot_write_end_every_process(pictures, tmp_path) -> None:
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    (tmp_path / "cache-1").write_text("in the way")
    settings = [f"data.vae={tmp_path / 'vae'}", "data.size=16", f"data.cache={tmp_path}/cache-RANK"]
    done = launched(tmp_path, pictures, str(tmp_path / "out"), *settings)
    assert done.returncode != 0
    (message,) = messages(done)
    assert "cache-1" in message
