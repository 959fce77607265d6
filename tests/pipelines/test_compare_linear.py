"""Comparing the linear family: the cores' times and their table, and a whole comparison of tiny trained models."""

import json
import shutil
from pathlib import Path

import compare_linear
import pytest
from linear_family import cores, training
from support.tiny_training import make_pictures

from diffattn.training.config import TrainConfig

TINY = ["data.size=8", "model.hidden_size=16", "model.num_layers=3", "model.num_heads=2", "model.mediators=[4]",
        "optim.batch=4", "run.steps=2", "run.trackers=[]", "run.save_every=1", "run.precision=fp32"]  # fmt: skip
SAMPLE = {"in_channels": 3, "sample_size": 32, "num_classes": 10}


def time_cores(out: Path, tokens: str = "64,256", rounds: int = 2, batch: int = 1) -> None:
    compare_linear.cores(tokens, "16", batch, 16, 2, rounds, "cpu", "float32", out)


def test_cores_are_timed_tabulated_and_resumed(tmp_path: Path) -> None:
    time_cores(tmp_path, tokens="64")
    first = json.loads((tmp_path / "cores.json").read_text())["results"]["64"]["rounds"]
    time_cores(tmp_path, rounds=3)
    found = json.loads((tmp_path / "cores.json").read_text())
    assert found["results"]["64"]["rounds"][:2] == first
    assert [len(entry["rounds"]) for entry in found["results"].values()] == [3, 3]
    names = {"softmax", "16 mediators", "inline", "focused_linear", "mlla", "circulant"}
    assert set(found["results"]["256"]) == names | {"rounds"}
    table = (tmp_path / "cores.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert (tmp_path / "cores.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="holds times with another batch: choose another --out"):
        time_cores(tmp_path, batch=2)


def results(**ratios: list[float]) -> dict:
    sizes = (256, 1024, 4096)
    return {
        str(n): {name: {"time_ratio": {"median": x[i]}, "speedup": 1 / x[i]} for name, x in ratios.items()}
        for i, n in enumerate(sizes)
    }


def test_the_crossover_lies_on_a_line_in_logarithms() -> None:
    found = results(a=[2, 0.5, 0.1], b=[0.5, 0.2, 0.1], c=[4, 3, 2])
    assert cores.crossover(found, "a") == pytest.approx(512)
    assert cores.crossover(found, "b") == 256
    assert cores.crossover(found, "c") is None


def test_bars_are_told_where_they_were_measured() -> None:
    found = results(inline=[1, 1, 0.1], focused_linear=[1, 1, 0.5], circulant=[1, 1, 0.25])
    (line,) = cores.bars(found)
    assert "inline 10.0× (bar 8×: met)" in line
    assert "focused_linear 2.0× (bar 4×: missed)" in line
    assert cores.bars({"256": {}}) == []


def test_sizes_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be squares of at least 64, got 200"):
        cores.CoreConfig((200,))


@pytest.mark.parametrize("subject", training.SUBJECTS)
def test_every_subject_has_the_parameters_of_the_softmax_model(subject: str, tmp_path: Path) -> None:
    comparison = training.Comparison("", "", tmp_path)
    config, plain = (training.run_config(comparison, name, 0, SAMPLE) for name in (subject, "softmax"))
    own, wanted = (training.parameters(c.model_arguments() | SAMPLE) for c in (config, plain))
    assert abs(own / wanted - 1) < training.TOLERANCE
    assert (config.optim, config.objective, config.run.steps) == (plain.optim, plain.objective, plain.run.steps)


def test_a_comparison_runs_to_its_table_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    pictures = make_pictures(tmp_path / "pictures")

    def compare(subjects: str, *settings: str) -> None:
        compare_linear.train(
            str(pictures), str(pictures), [*TINY, *settings], "cifar-linear-cpu", subjects, 1, 8, 2, 1.0, 4,
            "cifar-classifier", 1, "cpu", "bfloat16", tmp_path / "out",
        )  # fmt: skip

    compare("softmax,inline")
    file = tmp_path / "out" / "trained.json"
    before = json.loads(file.read_text())["runs"]
    assert set(before) == {"softmax-0", "inline-0", "softmax-1", "inline-1"}
    compare("steps,softmax,inline")
    found = json.loads(file.read_text())
    assert {name: found["runs"][name] for name in before} == before
    assert {"fid", "kid", "kid_std"} <= set(found["runs"]["steps-0"]["scores"])
    assert all(run["gflops"] > 0 and run["peak_mib"] > 0 for run in found["runs"].values())
    assert found["time_ratio"]["softmax"]["median"] == 1
    table = (tmp_path / "out" / "trained.md").read_text()
    assert all(f"| {name} |" in table for name in ("softmax", "inline", "steps"))
    shutil.rmtree(tmp_path / "out" / "runs")  # results outlive the models
    compare("softmax,inline,steps")
    assert json.loads(file.read_text()) == found
    with pytest.raises(ValueError, match="choose another --out"):
        compare("softmax", "run.steps=3")


def test_steps_are_taken_from_the_model() -> None:
    assert training.steps_for(TrainConfig.read("cifar-linear-cpu")) == "[[64,2],[128,4]]"
    odd = ["model.num_heads=3", "model.hidden_size=36", "model.num_layers=2"]
    assert training.steps_for(TrainConfig.read("cifar-linear-cpu", None, odd)) == "[[12,1],[36,1]]"
