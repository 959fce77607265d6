"""Training in two processes on CPUs: replicated and sharded models, and a disk that fails one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from support.tiny_training import TINY, assert_same, last, run

from diffattn.training.accelerator import make_accelerator
from diffattn.training.config import TrainConfig

FSDP2 = Path(__file__).parents[2] / "pipelines/accelerate/fsdp2.yaml"

SETUP = """
import os
import sys
from pathlib import Path
from diffattn.training.config import TrainConfig
from diffattn.training.run import finish, train
from diffattn.training.setup import set_up
source, out, *settings = sys.argv[1:]
def prepared(name, *more):
    options = {"data.source": source, "run.out": f"{out}/{name}"}
    return set_up(TrainConfig.read(settings=[*settings, *more], options=options), "cpu")
def run(name, *more):
    train(prepared(name, *more))
"""

REPLICATED = """
run("whole")
run("resumed", "run.steps=5")
run("resumed")
finish()
"""

FAILING = """
setup = prepared("run")
try:
    train(setup)
except OSError as error:
    Path(out, f"failed-{setup.accelerator.process_index}").write_text(str(error))
setup.accelerator.wait_for_everyone()
if setup.accelerator.is_main_process:
    Path(out, "run/checkpoints").unlink()
setup.accelerator.wait_for_everyone()
train(setup)
finish()
"""

SHARDED = """
from accelerate.state import AcceleratorState
from torch.nn.modules.module import register_module_forward_pre_hook
from diffattn.models.layers import DiTBlock, TimestepEmbedder
def run(name, *more):
    setup = prepared(name, *more)
    assert setup.accelerator.is_fsdp2
    train(setup)
fp32 = ["optim.accumulation=2", "run.precision=fp32"]
run("whole", *fp32)
run("resumed", *fp32, "run.steps=5")
run("resumed", *fp32)
seen = set()
def look(module, inputs):
    if isinstance(module, (DiTBlock, TimestepEmbedder)):
        seen.add(str(inputs[0].dtype))
register_module_forward_pre_hook(look)
AcceleratorState._reset_state()  # one precision per process, else
run("bf16", "run.precision=bf16", "run.steps=2")
Path(out, f"seen-{os.environ['RANK']}").write_text(" ".join(seen))
finish()
"""


def launched(script: str, pictures: Path, out: Path, environment: dict[str, str] | None = None) -> str:
    """What two processes print."""
    path = out / "script.py"
    path.write_text(SETUP + script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    done = subprocess.run(
        [*launch, str(pictures), str(out), *TINY],
        capture_output=True, text=True, timeout=300, env=os.environ | (environment or {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_learned_alike(one: Path, other: Path) -> None:
    a, b = last(one)[0], last(other)[0]
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.allclose(a[part][name], b[part][name], atol=1e-3) for name in a[part])


def test_two_processes_resume_bit_for_bit_and_learn_what_one_does(pictures, tmp_path) -> None:
    said = launched(REPLICATED, pictures, tmp_path)
    assert "resuming at step 5" in said
    assert "4 in total, 2 per process; 2 on cpu" in said
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    run(pictures, tmp_path / "one")
    assert_learned_alike(tmp_path / "one", tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written_fails_on_every_process_and_none_hangs(pictures, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    said = launched(FAILING, pictures, tmp_path)
    assert said.count("checkpoint at step 3 not written") == 1
    assert said.count("checkpoint at step 6 not written") == 1
    for rank in (0, 1):
        assert "checkpoints" in (tmp_path / f"failed-{rank}").read_text()
    assert last(tmp_path / "run")[1]["progress"]["step"] == 8


def test_the_dry_run_prints_the_parallelism_and_precision_that_the_launcher_asks_for(pictures, tmp_path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "2"]
    program = [str(FSDP2.parents[1] / "train.py"), "--data", str(pictures), "--device", "cpu", "--dry-run", *TINY]
    done = subprocess.run([*launch, *program, f"run.out={tmp_path}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes         2 on cpu, model sharded over them (FSDP2), precision bf16" in done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision 'fp16'"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"set optim\.accumulation=4"),
    ],
)
def test_what_training_does_not_have_is_refused(pictures, monkeypatch, variable, value, message) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(TrainConfig.read(settings=TINY), "cpu")


def test_sharding_of_the_first_kind_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version 1; training shards with fsdp_version: 2 only"):
        make_accelerator(TrainConfig.read(settings=TINY), "cpu")


def test_a_sharded_model_trains_resumes_and_is_exported(pictures, tmp_path) -> None:
    """With the shipped configuration of FSDP2, as accelerate's launcher reads it."""
    options, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FSDP2), "train.py"])
    )
    environment = {k: v for k, v in prepare_multi_gpu_env(options).items() if "FSDP" in k}
    said = launched(SHARDED, pictures, tmp_path, environment)
    assert "resuming at step 5" in said
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    run(pictures, tmp_path / "one")
    assert_learned_alike(tmp_path / "one", tmp_path / "whole")
    exported = load_file(tmp_path / "whole/pipeline/transformer/diffusion_pytorch_model.safetensors")
    average = last(tmp_path / "whole")[0]["ema"]
    assert all(torch.equal(exported[name], weight) for name, weight in average.items())
    for rank in (0, 1):
        assert (tmp_path / f"seen-{rank}").read_text() == "torch.float32"  # tokens and times
