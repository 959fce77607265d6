"""The commands for SiTs, one after the other as a researcher uses them: train, generate, tune."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import call

from diffattn.drawing.request import record_of
from diffattn.sampling import EulerMaruyamaScheduler, SiTPipeline
from diffattn.training.config import TrainConfig

SMALL = [
    "data.size=8", "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.mediators=[1,4]",
    "optim.batch=4", "run.steps=3", "run.trackers=[]", "run.sample_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for name in ("cat", "ship"):
        (root / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    done = call("train", *SMALL, "--data", pictures, "--out", out, "--device", "cpu", "--seed", 5)
    assert done.exit_code == 0, done.output
    assert "6 pictures in 2 classes, 3 in each" in done.stdout
    assert "batch 4 in total" in done.stdout
    return out


@pytest.mark.slow
def test_train_saves_configuration_and_pipeline(trained) -> None:
    config = TrainConfig.read(file=trained / "config.json")
    assert (config.run.seed, config.model.hidden_size) == (5, 16)
    assert (trained / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_saved_configuration_runs_again(trained, pictures, tmp_path) -> None:
    done = call("train", "--config", trained / "config.json", "run.steps=1", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_dry_run_prints_the_cost_and_writes_nothing_but_its_json(pictures, tmp_path) -> None:
    file = tmp_path / "plan.json"
    done = call("train", *SMALL, "--data", pictures, "--out", tmp_path / "run", "--dry-run", "--json", file,
                "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    plan = json.loads(file.read_text())["plan"]
    assert set(plan["gflops"]) == {"1", "4"}
    assert plan["gflops"]["1"] < plan["gflops"]["4"]
    assert "GFLOPs per image" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "huge"], "preset must be one of"),
        (["optim.lr=fast"], "optim.lr must be float"),
        (["model.mediators=[5]"], "perfect square"),
        (["--data", "/nowhere"], "/nowhere"),
        (["optim.batch=0"], "optim.batch must be at least 1"),
        (["model.num_heads=0"], "model.num_heads must be at least 1"),
        (["run.sample_steps=0"], "run.sample_steps must be at least 1"),
        (["data.vae=/nowhere"], "data.vae='/nowhere' cannot be loaded as an AutoencoderKL"),
        (["--seed", "5", "optim.lr=0.5"], "optim.lr: 0.0001 -> 0.5"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trained, pictures, words, says) -> None:
    done = call("train", *SMALL, "--data", pictures, "--out", trained, "--device", "cpu", *words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_resumed_run_names_the_classes_that_do_not_match(trained, tmp_path) -> None:
    for name in ("cat", "boat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "0.png")
    done = call("train", *SMALL, "--data", tmp_path, "--out", trained, "--device", "cpu", "--seed", 5)
    assert done.exit_code == 2
    assert "missing in the data: 'ship'; unknown to the model: 'boat'" in done.stderr


@pytest.mark.slow
def test_checkpoints_that_do_not_name_their_classes_go_on(trained, pictures, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    content = json.loads(state.read_text())
    assert content.pop("classes") == ["cat", "ship"]
    state.write_text(json.dumps(content))
    done = call("train", *SMALL, "run.steps=4", "--data", pictures, "--out", tmp_path / "run", "--device", "cpu",
                "--seed", 5)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "resuming at step 3" in done.stdout


@pytest.mark.slow
def test_a_model_trained_on_another_path_says_so(pictures, tmp_path) -> None:
    done = call("train", *SMALL, "objective.path=gvp", "run.steps=1", "--data", pictures, "--out", tmp_path,
                "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    pipe: Any = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.scheduler = EulerMaruyamaScheduler()
    with pytest.raises(ValueError, match="path is 'linear', but the transformer was trained on 'gvp'"):
        pipe("cat", num_inference_steps=2)
    pipe.scheduler = EulerMaruyamaScheduler(path="gvp")
    assert len(pipe("cat", num_inference_steps=2).images) == 1


def test_weights_that_are_not_there_are_named(trained, tmp_path) -> None:
    shutil.copytree(trained / "pipeline", tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    del kept["blocks.1.mlp.fc1.bias"]
    save_file(kept, file, {"format": "pt"})
    done = call("generate", "--model", tmp_path / "model", "--prompt", "ship", "--device", "cpu", "--out", "x.png")
    assert done.exit_code == 2
    assert "missing: blocks.1.mlp.fc1.bias" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_generate_draws_a_class_with_mediators(trained, tmp_path) -> None:
    words = ["generate", "--model", trained / "pipeline", "--prompt", "ship", "--steps", 2, "--device", "cpu",
             "--dtype", "float32"]  # fmt: skip
    done = call(*words, "--out", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "a.png")
    assert (record["method"], record["preset"], record["width"]) == ("mediator", "balanced", 8)
    assert call(*words, "--method", "none", "--out", tmp_path / "b.png").exit_code == 0
    assert record_of(tmp_path / "b.png")["method"] == "none"
    unknown = call(*words[:3], "--prompt", "horse", "--device", "cpu", "--out", tmp_path / "c.png")
    assert unknown.exit_code == 2
    assert "horse" in unknown.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--distance", "l3"], "distance must be 'l1' or 'l2', got 'l3'"),
        (["--seed", -1], "seed must be at least 0 and below 2^63, got -1"),
        (["--guidance", -3], "guidance must be 0 or more, got -3"),
    ],
)
def test_tuning_refuses_what_is_out_of_range(trained, tmp_path, words, says) -> None:
    done = call("tune", "--model", trained / "pipeline", "--device", "cpu", *words, "--out", tmp_path / "a.json")
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_training_refuses_devices_that_it_would_not_use(pictures, tmp_path, device) -> None:
    done = call("train", *SMALL, "--data", pictures, "--out", tmp_path / "run", "--device", device, "--dry-run")
    assert done.exit_code == 2
    assert done.stderr == f"diffattn: device must be cpu or auto (accelerate's choice), got {device!r}\n"


@pytest.mark.slow
def test_a_teacher_with_mediators_is_refused_before_the_first_step(trained, pictures, tmp_path) -> None:
    done = call("train", *SMALL, f"objective.distill={trained / 'pipeline'}", "--data", pictures, "--out", tmp_path,
                "--device", "cpu")  # fmt: skip
    assert done.exit_code == 2
    assert "objective.distill: the teacher's attention must be softmax in every layer, got mediator" in done.stderr


@pytest.mark.slow
def test_tune_writes_a_recipe(trained, tmp_path) -> None:
    recipe, file = tmp_path / "recipe.json", tmp_path / "all.json"
    words = ["tune", "--model", trained / "pipeline", "--samples", 2, "--steps", 5, "--device", "cpu"]
    done = call(*words, "--budget", 1, "--out", recipe, "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(recipe.read_text())
    assert found["method"] == "mediator"
    assert found["protocol"]["found"]["error"] == 0  # the whole budget buys the most mediators
    assert len(json.loads(file.read_text())["candidates"]) == 2 + 9
    assert call(*words, "--budget", 2).exit_code == 2
    assert "no schedule costs" in call(*words, "--budget", 0.01, "--out", recipe).stderr
