"""Files that other programs wrote, through the command line and the page: class names, prompts, pictures, folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import call
from support.tiny_pictures import class_folders, folder, png
from typer.testing import Result

from diffattn.app.jobs import Limits
from diffattn.app.jobs.snippet import snippet
from diffattn.drawing.request import Request
from diffattn.evaluation import load_prompts
from diffattn.sampling import SiTPipeline
from diffattn.training.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing
SMALL = ("data.size=8", "model.patch_size=2", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2",
         "model.mediators=[1]", "optim.batch=12", "run.sample_every=0", "run.trackers=[]", "run.steps=1")  # fmt: skip


def trained(*words: object) -> Result:
    return call("train", "--device", "cpu", *words, *SMALL)


@pytest.mark.slow
def test_a_class_that_is_called_a_number_is_drawn_by_its_name(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", class_folders({str(i): 1 for i in range(12)}))
    assert trained("--data", data, "--out", tmp_path / "run").exit_code == 0
    place = tmp_path / "run/pipeline"
    names = json.loads((place / "model_index.json").read_text())["id2label"]
    assert list(names.values()) == sorted(str(i) for i in range(12))  # as every model until now has them
    pipe: Any = SiTPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.normal_(std=0.3)  # so that classes differ
    pipe.save_pretrained(place)

    def draw(label: Any) -> np.ndarray:
        images = pipe(
            label, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
        ).images
        return np.asarray(images[0])

    words = ("generate", "--model", place, "--guidance", 1, "--steps", 2, "--method", "none", "--device", "cpu")
    assert call(*words, "--prompt", "2", "--out", tmp_path / "x.png").exit_code == 0
    drawn = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(drawn, draw("2"))
    assert np.array_equal(drawn, draw(pipe.labels["2"]))
    assert not np.array_equal(drawn, draw("10"))
    code = snippet(Request(str(place), "2", method="none", guidance=1.0, steps=2, width=8, height=8), local=True)
    assert "pipe('2', " in code  # on the page


@pytest.mark.slow
def test_the_classes_that_were_chosen_are_said_before_training(tmp_path: Path) -> None:
    content = class_folders({"images/cat": 2, "images/dog": 2}) | {"README.md": b"# Pets"}
    data = folder(tmp_path / "data", content)
    said = trained("--data", data, "--out", tmp_path / "run", "--dry-run")
    assert said.exit_code == 0
    assert said.stdout.splitlines()[:2] == ["4 pictures in 2 classes, 2 in each", "2 classes from images/: cat, dog"]
    (data / "masks/cat").mkdir(parents=True)
    (data / "masks/cat/0.png").write_bytes(png(9))
    refused = trained("--data", data, "--out", tmp_path / "run", "--dry-run")
    assert refused.exit_code == 2
    assert "can be read in two ways" in refused.stderr


PROMPTS = ["a cat\u2028on a mat", "caf\xe9 \x85 noir", "ship"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_of_any_program_are_read(tmp_path: Path, coding: str, end: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"{end}".join([*PROMPTS[:2], "  ", PROMPTS[2], ""]).encode(coding))
    assert load_prompts(file) == PROMPTS


def test_a_prompts_file_that_is_no_text_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a cat\ncaf\xe9\n")
    words = ("evaluate", "--pictures", tmp_path, "--prompts", tmp_path / "prompts.txt", "--clip", tmp_path)
    refused = call(*words, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "prompts.txt' cannot be read: line 2 contains bytes that are not UTF-8" in refused.stderr


def test_the_box_of_the_page_has_the_same_lines() -> None:
    given = "\ufeff" + "\r\n".join([*PROMPTS, " ", ""])
    asked = Limits().measurement(["one"], accelerations=["agent/fast"], prompts=given)
    assert list(asked.prompts) == PROMPTS


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_settings_of_any_program_are_read(tmp_path: Path, coding: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes("data:\r\n  source: café\r\n".encode(coding))
    assert TrainConfig.read(file=file).data.source == "café"
    file.write_bytes(b"data:\n  source: caf\xe9\n")
    with pytest.raises(ValueError, match=r"settings.yaml' is not a readable JSON or YAML file: line 2 contains bytes"):
        TrainConfig.read(file=file)


def test_pairs_are_said(tmp_path: Path) -> None:
    for name, digits in (("a", 1), ("b", 5)):
        folder(tmp_path / name, {f"{i:0{digits}d}.png": png(i, 16) for i in range(12)})
    words = ("evaluate", "--pictures", tmp_path / "a", "--paired-with", tmp_path / "b", "--device", "cpu")
    done = call(*words, "--out", tmp_path / "run", "--json", tmp_path / "r.json")
    assert done.exit_code == 0
    assert "matched 12 pairs by number" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["details"]["pairs"]["identical_pairs"] == 12
    (tmp_path / "b/00003.png").rename(tmp_path / "b/00012.png")
    refused = call(*words, "--out", tmp_path / "run2")
    assert refused.exit_code == 2
    assert "'3.png' without a partner; '00012.png' without a partner" in refused.stderr
