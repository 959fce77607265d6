"""The command line: what it prints and writes, and its exit codes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from support import tiny
from support.commands import call
from support.tiny_dit import tiny_dit

import diffattn
from diffattn.architectures.decisions import Decision
from diffattn.drawing.request import record_of
from diffattn.files import MAX_BYTES, stem_of
from diffattn.patching.decision_cache import DecisionCache
from diffattn.sampling import SiTPipeline

COMMANDS = ("demo", "generate", "info")
GROUPS = ("bench",)
OPTIONS = {"min_tokens": 0, "num_agents": 4, "agent_ratio": None, "max_head_error": 10.0}
EVERYWHERE = tuple(part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}".lower()))
ROOT = Path(diffattn.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: sd, a model; pickle, one whose weights are pickles; sit, one without a null class; empty."""
    place = tmp_path_factory.mktemp("models")
    tiny.pipeline("sd", place / "tokenizer").save_pretrained(place / "sd")
    shutil.copytree(place / "sd", place / "pickle")
    for weights in (place / "pickle").rglob("*.safetensors"):
        weights.unlink()
        torch.save({}, weights.with_suffix(".bin"))
    sit = tiny_dit(in_channels=3, null_class=False)
    SiTPipeline(sit, FlowMatchEulerDiscreteScheduler(shift=1)).save_pretrained(place / "sit")
    (place / "empty").mkdir()
    return place


# Help


@pytest.mark.slow
def test_python_m_diffattn() -> None:
    done = subprocess.run([sys.executable, "-m", "diffattn", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in (*COMMANDS, *GROUPS))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    found = call(command, "--help")
    assert found.exit_code == 0
    assert "--json" in found.stdout
    if command != "info":
        for option in ("--seed", "--device", "--dtype", "[default: auto]"):
            assert option in found.stdout
        assert re.search(r"--steps .*\[default: \d+\]", found.stdout, re.DOTALL)


@pytest.mark.parametrize(("words", "shown"), [((), "generate"), (("bench",), "thresholds")])
def test_without_a_command_there_is_help_and_no_success(words: tuple[str, ...], shown: str) -> None:
    found = call(*words)
    assert found.exit_code == 2
    assert shown in found.stdout


def test_the_command_line_imports_nothing_heavy() -> None:
    for file in (ROOT / "cli").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                light = top in sys.stdlib_module_names or top in ("typer", "rich") or name.startswith("diffattn.cli")
                assert light, f"{file.name} imports {name}"


# Bad input


TOO_LONG = "x" * 300

BAD = {
    "unknown command": ("nonsense", "nonsense"),
    "no prompt": ("generate", "--prompt"),
    "unknown flag": ("generate --prompt x --nonsense 3", "--nonsense"),
    "not a number": ("generate --prompt x --steps many", "many"),
    "no model": ("generate --prompt x --model nothing", "nothing"),
    "not a model": ("generate --prompt x --model {}/empty", "model_index.json"),
    "pickles": ("generate --prompt x --model {}/pickle", "safetensors"),
    "hub": ("generate --prompt x --model diffattn-tests/there-is-no-such-model", "there-is-no-such-model"),
    "size": ("generate --prompt x --model {}/sd --width 33", "32 or 40"),
    "method": ("generate --prompt x --model {}/sd --method nothing", "agent"),
    "preset": ("generate --prompt x --model {}/sd --preset nothing", "balanced, fast, pooled, paper"),
    "option": ("generate --prompt x --model {}/sd --option nothing=3", "num_agents"),
    "option without value": ("generate --prompt x --model {}/sd --option num_agents", "key=value"),
    "a method as option": ("generate --prompt x --model {}/sd --option method=agent", "unknown option method of"),
    "a preset as option": ("generate --prompt x --model {}/sd --option preset=fast", "unknown option preset of"),
    "layers as option": (
        "generate --prompt x --model {}/sd --method agent --option layers=1",
        "unknown option layers of method 'agent'; allowed: ",
    ),
    "calibrate as option": ("generate --prompt x --model {}/sd --option calibrate=1", "unknown option calibrate of"),
    "agents": ("generate --prompt x --model {}/sd --option num_agents=0", "1 or more"),
    "agents for every token": ("generate --prompt x --model {}/sd --option num_agents=100000", "below the 256 tokens"),
    "agents as a word": ("generate --prompt x --model {}/sd --option num_agents=many", "num_agents"),
    "steps": ("generate --prompt x --model {}/sd --steps 0", "1 or more"),
    "steps of no scheduler": ("generate --prompt x --model {}/sd --steps 1001", "1001"),
    "no null class": ("generate --prompt 1 --guidance 4 --model {}/sit", "null class"),
    "images": ("generate --prompt x --model {}/sd --num-images 0", "1 or more"),
    "seed": ("generate --prompt x --model {}/sd --seed -1", "seed"),
    "guidance": ("generate --prompt x --model {}/sd --guidance nan", "guidance"),
    "device": ("generate --prompt x --model {}/sd --device tpu", "cpu"),
    "dtype": ("generate --prompt x --model {}/sd --dtype float8", "float32, float16, bfloat16"),
    "not a PNG": ("generate --prompt x --model {}/sd --out x.jpg", "x.jpg"),
    "out below a file": ("generate --prompt x --model {0}/sd --out {0}/sd/model_index.json/x.png", "model_index.json"),
    "JSON is a folder": ("generate --prompt x --model {0}/sd --json {0}", "folder"),
    "a long model": (f"generate --prompt x --model {TOO_LONG}", "no model"),
    "a long hub id": (f"generate --prompt x --model {TOO_LONG}/{TOO_LONG}", "no model"),
    "a long JSON": (f"generate --prompt x --model {{}}/sd --json {TOO_LONG}", "name too long"),
    "a long out": (f"generate --prompt x --model {{}}/sd --out {TOO_LONG}.png", "name too long"),
    "a long folder": (f"generate --prompt x --model {{}}/sd --out {TOO_LONG}/x.png", "name too long"),
    "demo model": ("demo --model nothing", "nothing"),
    "demo steps": ("demo --steps 0", "1 or more"),
    "demo rounds": ("demo --rounds 0", "1 or more"),
    "demo device": ("demo --device tpu", "cpu"),
    "demo preset": ("demo --preset nothing", "balanced"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_exit_code_2(case: str, models: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a default --out lands there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else its client tries again for long
    line, named = BAD[case]
    found = call(*line.format(models).split())
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    told = found.stderr.strip().splitlines()
    assert len(told) == 1, found.stderr
    assert told[0].startswith("diffattn: ")
    assert named in told[0]
    assert not list(tmp_path.iterdir())  # not even a folder for the results


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_files_that_cannot_be_written_again_are_refused(
    option: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.png"
    file.touch()
    may = lambda path, mode, **_: mode != os.W_OK or Path(path) != file  # noqa: E731, root may write everything
    monkeypatch.setattr("diffattn.cli.common.os.access", may)
    found = call("generate", "--prompt", "x", "--model", models / "sd", option, file)
    assert found.exit_code == 2, found.output
    assert found.stderr.strip() == f"diffattn: cannot write to {str(file)!r}: no permission"


# Work


@pytest.mark.slow
def test_generate_one_picture(models: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "new" / "cat.png", tmp_path / "also new" / "cat.json"
    found = call("generate", "--model", models / "sd", "--prompt", "a cat", "--steps", 3, "--width", 40, *EVERYWHERE,
                 "--out", out, "--json", figures)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert Image.open(out).size == (40, tiny.SIZE)
    record = record_of(out)
    assert record["options"] == OPTIONS
    assert record["model"] == str(models / "sd")
    results = json.loads(figures.read_text())
    assert results["pictures"][0]["file"] == str(out)
    assert results["report"]["layers_accelerated"] == 7
    assert "7 ran accelerated" in found.stdout
    assert str(out) in found.stdout


@pytest.mark.slow
def test_generate_several_pictures(models: Path, tmp_path: Path) -> None:
    shared = ("generate", "--model", models / "sd", "--prompt", "", "--steps", 2, *EVERYWHERE)
    assert call(*shared, "--num-images", 2, "--seed", 3, "--out", tmp_path / "many").exit_code == 0
    files = sorted((tmp_path / "many").iterdir())
    assert [file.name for file in files] == ["empty-3.png", "empty-4.png"]
    assert call(*shared, "--seed", 4, "--out", tmp_path / "one.png").exit_code == 0
    alone = np.asarray(Image.open(tmp_path / "one.png"))
    assert np.array_equal(alone, np.asarray(Image.open(files[1])))
    assert not np.array_equal(alone, np.asarray(Image.open(files[0])))
    assert call(*shared, "--num-images", 2, "--out", tmp_path / "some.png").exit_code == 0
    assert {file.name for file in tmp_path.glob("some*")} == {"some-0.png", "some-1.png"}
    assert call(*shared, "--out", tmp_path / "version-1.5").exit_code == 0  # a folder, not a file type
    assert [file.name for file in (tmp_path / "version-1.5").iterdir()] == ["empty-0.png"]


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a cat!", "a-cat"),
        ("", "empty"),
        ("\ud800", "empty"),
        ("é" * 99, "é" * 60),
        ("𠮷" * 99, "𠮷" * (MAX_BYTES // 4)),
    ],
)
def test_a_prompt_makes_a_name_that_a_file_can_have(prompt: str, stem: str) -> None:
    assert stem_of(prompt) == stem


@pytest.mark.slow
def test_generate_writes_a_file_for_a_prompt_of_long_characters(models: Path, tmp_path: Path) -> None:
    done = call(
        "generate", "--model", models / "sd", "--prompt", "𠮷" * 99, "--steps", 1, *EVERYWHERE, "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.iterdir()
    assert record_of(file)["prompt"] == "𠮷" * 99


@pytest.mark.slow
def test_generate_unpatched(models: Path, tmp_path: Path) -> None:
    shared = ("generate", "--model", models / "sd", "--prompt", "a cat", "--steps", 2, "--dtype", "bfloat16")
    found = call(*shared, "--method", "none", "--out", tmp_path / "x.png", "--json", tmp_path / "x.json")
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "x.json").read_text())["report"] is None
    record = record_of(tmp_path / "x.png")
    assert (record["method"], record["preset"], record["dtype"]) == ("none", None, "bfloat16")


def test_info(tmp_path: Path) -> None:
    found = call("info", "--json", tmp_path / "info.json")
    assert found.exit_code == 0, found.output
    told = json.loads((tmp_path / "info.json").read_text())
    assert told["versions"]["diffattn"] == diffattn.__version__
    assert told["devices"]["cpu"]["threads"] >= 1
    assert told["methods"]["agent"]["options"]["damping"] == 1e-5
    assert set(told["methods"]["agent"]["presets"]) == {"balanced", "fast", "pooled", "paper"}
    assert told["embedded_models"]["emoji-sd"]["installed"] is True
    assert any("UNet2DConditionModel" in title for title in told["architectures"])
    assert "cpu" in told["thresholds"]["devices"]
    for word in (torch.__version__, "emoji-sd", "num_agents", "UNet2DConditionModel"):
        assert word in found.stdout


def test_info_names_this_machines_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.json"
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(own))
    own.write_text('{"devices": {"cpu": {"64": 7}}}')
    assert call("info", "--json", tmp_path / "info.json").exit_code == 0
    told = json.loads((tmp_path / "info.json").read_text())["thresholds"]
    assert told["file"] == str(own)
    assert told["devices"]["cpu"] == {"64": 7}
    own.write_text("{")
    found = call("info")
    assert found.exit_code == 2
    assert str(own) in found.stderr


@pytest.mark.slow
def test_info_names_the_cache_of_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, dict[str, int]]:
        assert call("info", "--json", tmp_path / "info.json").exit_code == 0
        return json.loads((tmp_path / "info.json").read_text())["decisions"]

    assert told() == {"file": None, "known": {}}  # switched off in all tests
    cache = tmp_path / "decisions.json"
    monkeypatch.setenv("DIFFATTN_CALIBRATE", str(cache))
    assert told()["known"]["cpu"] == 0
    cpu = torch.device("cpu")
    DecisionCache(cache).add(cpu, {"kind: cpu, 1": Decision(True, "measured here", 1.0, 2.0)})
    assert told() == {"file": str(cache), "known": told()["known"] | {"cpu": 1}}
    cache.write_text("{")
    found = call("info")
    assert found.exit_code == 2
    assert str(cache) in found.stderr
