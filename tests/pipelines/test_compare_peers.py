"""`pipelines/compare_peers.py` on a tiny model: its figures, tables and plots, resuming, bad input."""

import io
import json
import os
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support import tiny
from support.peer_packages import needs
from typer.testing import CliRunner

from diffattn.machine import git_commit
from diffattn.measure.models import UNETS
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import Preset

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

from compare_peers import app
from peers import KINDS
from peers.pictures import builtin_prompts
from peers.report import COLOURS, _by_chance, front
from peers.results import Results
from peers.timing import share_of_saving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline("sd", tmp_path_factory.mktemp("pipe")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zip") / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(8):
            tiny.picture(i).save(file := io.BytesIO(), "PNG")
            archive.writestr(f"{i}.png", file.getvalue())
        rows = [json.dumps({"file_name": f"{i}.png", "text": f"name {i}"}) for i in range(8)]
        archive.writestr("metadata.jsonl", "\n".join(rows))
    return path


QUALITY = "quality --variants agent,keys-sampled,agent+steps-15 --steps 4 --pictures 1 --batch 2 --rounds 2"


def program(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def measured(model, pictures_zip, tmp_path_factory: pytest.TempPathFactory):
    """(folder of the results, the results, the command)"""
    out = tmp_path_factory.mktemp("quality")
    words = [*QUALITY.split(), "--model", model, "--min-tokens", 0, "--device", "cpu", "--threads", 1, "--out", out,
             "--kid-pictures", 4, "--reference", pictures_zip, "--every", 2, "--scored", "agent,agent+steps-15",
             "--seed-sets", 2]  # fmt: skip
    program(*words)
    return out, json.loads((out / "quality.json").read_text()), words


def test_quality_has_every_figure_and_its_conditions(measured, model):
    _, data, _ = measured
    entry = data["entries"][str(model)]
    variants = {"sdpa", "agent", "keys-sampled", "agent+steps-15"}
    assert set(entry["pictures"]) == variants
    assert set(entry["scores"]) == {"sdpa", "agent", "agent+steps-15", "sdpa, other seeds 1"}
    assert [set(r) for r in entry["rounds"]] == [variants] * 2
    assert entry["layers"] == {"agent": 3, "agent+steps-15": 3}
    assert data["protocol"]["prompts"]["held-out"] == builtin_prompts("held-out")[:1]
    assert {"torch", "diffusers", "tomesd", "DeepCache", "tgate"} <= set(data["machine"]["versions"])
    same, agent = entry["pictures"]["sdpa"]["trained"], entry["pictures"]["agent"]["held-out"]
    assert same["identical"]
    assert same["psnr"] == [None]
    assert same["latent_error"] == [0.0]
    assert not agent["identical"]
    assert all(value > 0 for value in agent["psnr"])
    assert [len(row) for row in agent["latent_error_per_step"]] == [4]
    assert [row[-1] for row in agent["latent_error_per_step"]] == agent["latent_error"]
    assert entry["pictures"]["agent+steps-15"]["trained"]["latent_error_per_step"] is None
    seeds = {name: s["protocol"]["seeds"] for name, s in entry["scores"].items()}
    assert seeds == dict.fromkeys(("sdpa", "agent", "agent+steps-15"), "0..3") | {"sdpa, other seeds 1": "4..7"}
    assert entry["commits"] == [git_commit()]
    assert len(entry["commands"]) == 1


def test_quality_is_told_as_a_table_and_drawn(measured):
    out, _, _ = measured
    text = (out / "quality.md").read_text()
    assert "| variant | time ratio (IQR) |" in text
    assert "identical / identical" in text
    assert "agent+steps-15 is" in text
    assert "as fast as agent alone" in text
    assert "of exact attention over 2 sets of seeds" in text
    with Image.open(out / "pareto.png") as picture:
        assert picture.width > picture.height > 500


def test_sada_alone_and_with_agents(model, tmp_path):
    program("quality", "--variants", "sada,agent+sada", "--steps", 10, "--pictures", 1, "--rounds", 1, "--model", model,
            "--min-tokens", 0, "--device", "cpu", "--threads", 1, "--out", tmp_path)  # fmt: skip
    entry = json.loads((tmp_path / "quality.json").read_text())["entries"][str(model)]
    assert not entry["left_out"]
    assert [set(r) for r in entry["rounds"]] == [{"sdpa", "sada", "agent+sada"}]
    assert entry["layers"] == {"agent+sada": 3}
    errors = {name: entry["pictures"][name]["trained"]["latent_error"][0] for name in ("sada", "agent+sada")}
    assert 0 < errors["sada"] < errors["agent+sada"]


def test_resume_does_only_what_is_missing(measured, model):
    out, before, words = measured
    entry = before["entries"][str(model)]
    del entry["rounds"][1]["agent"], entry["pictures"]["keys-sampled"], entry["scores"]["agent+steps-15"]
    entry["left_out"] = {"deepcache-5": "an earlier run's reason"}
    (out / "quality.json").write_text(json.dumps(before))
    told = program(*words, "--resume")
    assert "deepcache-5 left out: an earlier run's reason" in told
    after = json.loads((out / "quality.json").read_text())["entries"][str(model)]
    assert after["rounds"][:2] == entry["rounds"]
    assert [set(r) for r in after["rounds"][2:]] == [{"sdpa", "agent"}]
    assert after["pictures"]["agent"] == entry["pictures"]["agent"]
    assert "keys-sampled: 2 pictures drawn" in told
    assert told.count("pictures drawn") == told.count("FID ") - told.count("| FID |") == 1


def test_resume_refuses_another_protocol(measured):
    _, _, words = measured
    words = ["--resume", *("5" if i and words[i - 1] == "--steps" else w for i, w in enumerate(words))]
    result = CliRunner().invoke(app, [str(w) for w in [words[1], *words[:1], *words[2:]]])
    assert result.exit_code == 2
    assert "steps (4, now 5)" in result.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--levels", "0"), "levels ([0, 1], now [0])"),
        (("--kid-pictures", "5"), "scored_pictures (4, now 5)"),
        (("--every", "1"), "every (2, now 1)"),
    ],
)
def test_resume_refuses_other_levels_and_numbers_of_pictures(measured, changed, message):
    _, _, words = measured
    result = CliRunner().invoke(app, [*map(str, words), *changed, "--resume"])
    assert result.exit_code == 2
    assert message in result.output


def test_resume_refuses_other_pictures_of_the_same_name_and_other_agents(measured, pictures_zip, tmp_path, monkeypatch):
    _, _, words = measured
    other = tmp_path / pictures_zip.name
    other.write_bytes(pictures_zip.read_bytes() + b" ")
    result = CliRunner().invoke(app, [*map(str, words), "--reference", str(other), "--resume"])
    assert "reference_sha256 (" in result.output
    fast = Preset(options={"num_agents": 2, "agent_ratio": None})
    monkeypatch.setattr(AgentAttention, "presets", {**AgentAttention.presets, "fast": fast})
    result = CliRunner().invoke(app, [*map(str, words), "--resume"])
    assert "agents_sha256 (" in result.output


def test_scores_of_another_protocol_are_refused_and_nothing_is_written(measured, model):
    out, _, words = measured
    data = json.loads((out / "quality.json").read_text())
    scores = data["entries"][str(model)]["scores"]
    taken = scores.pop("agent")
    scores["sdpa"]["protocol"]["guidance"] = 9.0
    (out / "quality.json").write_text(json.dumps(data))
    result = CliRunner().invoke(app, [*map(str, words), "--resume"])
    assert "guidance: 9.0 and 2.5" in str(result.exception)
    scores_now = json.loads((out / "quality.json").read_text())["entries"][str(model)]["scores"]
    assert scores_now == scores
    scores["sdpa"]["protocol"]["guidance"], scores["agent"] = 2.5, taken
    (out / "quality.json").write_text(json.dumps(data))


def test_resume_refuses_figures_of_other_versions_and_adds_its_commit_to_those_it_keeps(tmp_path):
    def begun(version: str, commit: str, resume: bool) -> Results:
        machine = {"versions": {"tomesd": version}, "commit": commit}
        return Results(tmp_path / "a.json", {"machine": machine, "command": "c", "protocol": {}}, resume)

    first = begun("1", "old", False)
    first.entry("model")
    first.save()
    assert begun("1", "new", True).entry("model")["commits"] == ["old", "new"]
    with pytest.raises(ValueError, match=r"tomesd version \('1', now '2'\)"):
        begun("2", "new", True)


def test_chance_is_the_range_of_exact_attention_over_sets_of_seeds():
    kid = {"sdpa": 0.001, "sdpa, other seeds 1": 0.003, "agent": 0.003, "tome-0.5": 0.0031}
    entry = {"scores": {name: {"scores": {"kid": value}} for name, value in kid.items()}}
    (told,) = _by_chance(entry)
    assert told.endswith("over 2 sets of seeds: 1.00 to 3.00. No higher: agent. Above: tome-0.5.")


def test_speed_of_whole_runs_of_both_kinds_of_unet(tmp_path, monkeypatch, measured):
    for name in ("deepcache", "tgate"):
        needs(name)
    xl = {key: UNETS["sdxl"].config[key] for key in ("use_linear_projection", "addition_embed_type")}
    xl |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    monkeypatch.setitem(UNETS, "tinyxl", replace(UNETS["tiny"], config={**UNETS["tiny"].config, **xl}))
    variants = "agent,deepcache-3,agent+deepcache-3,deepcache-5,tgate,agent+tgate,steps-10,floor"
    told = program("speed", "--unets", "tiny,tinyxl", "--sizes", 128, "--variants", variants, "--min-tokens", 0,
                   "--rounds", 1, "--device", "cpu", "--dtype", "float32", "--out", tmp_path)  # fmt: skip
    entries = json.loads((tmp_path / "speed.json").read_text())["entries"]
    assert list(entries) == ["tiny 128", "tinyxl 128"]
    for entry in entries.values():
        timed = {"sdpa", "agent", "deepcache-3", "agent+deepcache-3", "tgate", "agent+tgate", "steps-10", "floor"}
        assert [set(r) for r in entry["rounds"]] == [timed]
        assert list(entry["left_out"]) == ["deepcache-5"]
        assert entry["layers"]["agent+deepcache-3"] == entry["layers"]["agent"] > 0
    (tmp_path / "quality.json").write_text((measured[0] / "quality.json").read_text())
    program("together", "--unet", "tiny 128", "--folder", tmp_path)
    with Image.open(tmp_path / "pareto-large.png") as picture:
        assert picture.width > picture.height > 500
    result = CliRunner().invoke(app, ["together", "--unet", "sd15 512", "--folder", str(tmp_path)])
    assert "there are: tiny 128, tinyxl 128" in result.output
    assert re.search(r"agent\+deepcache-3 is [\d.]+x as fast as deepcache-3 alone", told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quality --variants nonsense", "unknown variant 'nonsense'"),
        ("quality --kid-pictures 8", "go together"),
        (f"quality --kid-pictures 3 --reference {__file__}", "4 or more"),
        ("quality --reference no.zip", "does not exist"),
        ("quality --prompts no.txt", "does not exist"),
        (f"quality --prompts {os.devnull}", "holds no prompts"),
        ("quality --levels 0,7", "no self-attention at level 7"),
        ("quality --guidance 1", "above 1"),
        ("speed --unets sd3", "unknown UNet sd3"),
        ("speed --unets tiny --sizes big", "whole numbers"),
    ],
)
def test_bad_input(words, message):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert message in result.output


def test_the_share_of_the_saving_is_that_of_the_rounds_in_which_all_three_ran():
    rounds = [{"sdpa": 10.0, "floor": 6.0, "agent": 7.0}, {"sdpa": 20.0, "floor": 10.0}, {"sdpa": 9.0, "agent": 1.0}]
    found = share_of_saving(rounds, "agent", "floor")
    assert found is not None
    assert found.median == 0.75
    assert share_of_saving(rounds[1:], "agent", "floor") is None
    assert share_of_saving([{"sdpa": 1.0, "floor": 1.1, "agent": 0.9}], "agent", "floor") is None


def test_the_front_holds_what_nothing_else_beats():
    points = {"fast": (0.5, 20.0), "good": (0.9, 30.0), "worse": (0.6, 19.0), "tied": (0.5, 20.0)}
    assert front(points) == ["fast", "good", "tied"]


def test_every_kind_of_peer_has_a_colour() -> None:
    assert {*KINDS, "combined"} <= {*COLOURS}
