"""`pipelines/train_emoji_sit.py` end to end on six generated pictures, of which three are classes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_pictures import captioned, packed
from typer.testing import CliRunner

from diffattn.sampling import SiTPipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

from train_emoji_sit import app

SMALL = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "optim.batch=2", "run.precision=fp32")
NAMES = ("crab", "key", "family: man, boy", "lion", "tent", "ship")

pytestmark = pytest.mark.slow


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data") / "pictures.zip", captioned(NAMES, 512))


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    run("train", "--data", data, "--work", folder, "--steps", 1, "--every", 2, *SMALL)
    return folder


def test_every_size_starts_from_the_one_below_and_keeps_the_names(work: Path) -> None:
    starts = [json.loads((work / size / "config.json").read_text())["model"]["start"] for size in ("128", "256", "512")]
    assert starts == [None, str(work / "128" / "pipeline"), str(work / "256" / "pipeline")]
    pipe = SiTPipeline.from_pretrained(work / "512" / "pipeline")
    assert pipe.transformer.config["sample_size"] == 64
    assert set((pipe.class_names.id2label or {}).values()) == {"crab", "family: man, boy", "tent"}
    assert pipe.own_guidance == 1.5


def test_what_is_finished_is_not_trained_again(data: Path, work: Path) -> None:
    before = (work / "512" / "pipeline" / "model_index.json").stat().st_mtime_ns
    said = run("train", "--data", data, "--work", work, "--steps", 1, "--every", 2, *SMALL)
    assert said.count("is complete") == 3
    assert (work / "512" / "pipeline" / "model_index.json").stat().st_mtime_ns == before


def test_the_model_is_judged_and_exported_with_its_card(data: Path, work: Path, tmp_path: Path) -> None:
    run("judge", work / "512" / "pipeline", "--data", data, "--numbers", "4,16", "--steps", 2, "--every", 2,
        "--guidance", "1,1.5", "--dtype", "float32", "--out", tmp_path / "judged")  # fmt: skip
    figures = json.loads((tmp_path / "judged" / "figures.json").read_text())
    assert [(row["num_mediators"], row["guidance"]) for row in figures["judged"]] == [
        (4, 1.0), (4, 1.5), (16, 1.0), (16, 1.5)
    ]  # fmt: skip
    assert all(row["trained_names"] == 3 for row in figures["judged"])
    assert Image.open(tmp_path / "judged" / "grid-16-1.5.png").width > 128
    out = tmp_path / "model"
    out.mkdir()
    (out / "first_steps.json").write_text("{}")
    (out / "old.json").write_text("{}")
    run("export", "--work", work, "--figures", tmp_path / "judged" / "figures.json", "--guidance", 1.25, "--out", out)
    assert (out / "first_steps.json").exists()
    assert not (out / "old.json").exists()
    assert "_name_or_path" not in "".join(path.read_text() for path in out.rglob("*.json"))
    pipe = SiTPipeline.from_pretrained(out)
    assert pipe.own_guidance == 1.25
    output: Any = pipe(["tent"], num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    drawn = output.images[0]
    assert drawn.size == (512, 512)
    card = (out / "README.md").read_text()
    assert "| 16 | 1.5 |" in card
    assert "| 512×512 | 1,024 |" in card
