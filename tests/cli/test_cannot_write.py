"""A full disk, or a place that cannot be written: one sentence that names it, exit status 2, older files untouched."""

import json
import re
from pathlib import Path

import pytest
from support import tiny, web
from support.commands import call
from support.full_disk import full_disk
from support.tiny_dit import tiny_dit
from support.tiny_metrics import random_pictures
from typer.testing import Result

from diffattn.metrics.adm import write_pictures
from diffattn.metrics.classifier import Classifier

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sit and sd, tiny models; dit, a folder of weights; a.npz of 16x16 pixels; extractor; prompts.txt."""
    found = tmp_path_factory.mktemp("models")
    web.save_sits(found, "sit")
    tiny.pipeline("sd", found / "tokenizer").save_pretrained(found / "sd")
    tiny_dit(in_channels=3).save_pretrained(found / "dit")
    write_pictures(found / "a.npz", random_pictures(2, size=16))
    Classifier(5, 16, (6, 8, 10), 8, "CIFAR-10").save_pretrained(found / "extractor")
    (found / "prompts.txt").write_text("a cat\n")
    return found


def refused(done: Result, file: Path) -> None:
    """Whether a command ended with one line about this file."""
    assert done.exit_code == 2, done.output
    told = done.stderr.strip().splitlines()[-1]
    assert re.match(rf"diffattn: cannot write (to )?'{re.escape(str(file))}': \S", told), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(file.parent.rglob("*.part"))


REFERENCE = "evaluate reference --extractor cifar-classifier --extractor-weights {1}/extractor --device cpu {1}/a.npz"
COMMANDS = {
    "info": ("info --json {0}", "{0}"),
    "picture": ("generate --model {1}/sit --device cpu --prompt 1 --steps 1 --out {0}", "{0}"),
    "recipe": ("tune --model {1}/sd --device cpu --prompts {1}/prompts.txt --max-error 0.5 --steps 2 --bands 1"
               " --cost flops --out {0}", "{0}"),
    "run": ("evaluate --pictures {1}/a.npz --paired-with {1}/a.npz --device cpu --out {0}", "{0}/worst_pairs.png"),
    "moments": (f"{REFERENCE} {{0}}.npz", "{0}.npz"),
    "features": (f"{REFERENCE} {{0}}.safetensors", "{0}.safetensors"),
    "official weights": ("convert {1}/dit {0}.safetensors --to official", "{0}.safetensors"),
    "weights": ("convert {1}/dit {0}", "{0}"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(COMMANDS))
def test_a_full_disk_is_one_sentence(case: str, place: Path, tmp_path: Path) -> None:
    line, named = (text.format(tmp_path / "new.png", place) for text in COMMANDS[case])
    with full_disk():
        refused(call(*line.split()), Path(named))


def test_an_older_file_survives_a_full_disk(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    file.write_text('{"old": true}')
    with full_disk():
        refused(call("info", "--json", file), file)
    assert json.loads(file.read_text()) == {"old": True}
    assert [*tmp_path.iterdir()] == [file]


def test_a_file_that_turns_out_to_be_a_folder_is_one_sentence(place: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--model", place / "sit", "--paired-with", place / "a.npz", "--num-pictures", 2, "--steps", 1)
    inside = tmp_path / "run/pictures"
    refused(call(*words, "--device", "cpu", "--out", tmp_path / "run", "--json", inside), inside)
    assert len([*inside.glob("*.png")]) == 2


@pytest.mark.parametrize(
    ("words", "file", "other"),
    [
        (("evaluate", "--pictures", "x", "--out", "run", "--json", "run"), "run", "run"),
        (("evaluate", "--pictures", "x", "--out", "run/a", "--save-npz", "./run"), "run", "run/a"),
        (("evaluate", "--pictures", "x", "--save-npz", "a", "--json", "a"), "a", "a"),
        (("generate", "--prompt", "x", "--out", "x.png", "--json", "x.png"), "x.png", "x.png"),
        (("generate", "--prompt", "x", "--out", "new", "--json", "new"), "new", "new/x-0.png"),
        (("tune", "--model", "x", "--out", "r.json", "--json", "r.json"), "r.json", "r.json"),
        (("demo", "--out", "new", "--json", "new"), "new", "new"),
        (("bench", "attention", "--out", "new", "--json", "new"), "new", "new"),
        (("bench", "thresholds", "--out", "t.json", "--json", "t.json"), "t.json", "t.json"),
        (("convert", "x", "new", "--to", "diffusers", "--json", "new"), "new", "new"),
    ],
)
def test_two_outputs_in_one_place_are_refused_before_the_work(
    words: tuple[str, ...], file: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*words)
    assert done.exit_code == 2, done.output
    assert done.stderr == f"diffattn: cannot write to {file!r}: that is the place of another output, {other!r}\n"
    assert not list(tmp_path.iterdir())
