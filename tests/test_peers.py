"""The compared methods: each runs, does what it says, and leaves the pipeline as it was."""

import io
import json
import os
import re
import sys
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from reference import cases
from typer.testing import CliRunner

import diffattn
from diffattn.evaluation.benchmark_models import MODELS
from diffattn.evaluation.machine import git_commit
from diffattn.injection import find_patch
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import Preset

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

from compare_peers import app
from peers import VARIANTS, LeftOut, Setting, apply, check_names
from peers.downsampling import DownsampledKeys, pooled, sampled
from peers.pictures import builtin_prompts
from peers.report import _by_chance, front
from peers.results import Results
from peers.tiles import TiledAttention, cut, join
from peers.timing import share_of_saving

SETTING = Setting(levels=(0, 1), steps=20, min_tokens=0)
ALL = (*(name for name in VARIANTS if name != "steps-17"), "floor", "steps-14+deepcache-2", "tgate+agent-fast")


def needs(name: str) -> None:
    """Skips where a package is not installed."""
    packages = {"tome": "tomesd", "deepcache": "DeepCache", "tgate": "tgate"}
    for kind, package in packages.items():
        if kind in name:
            pytest.importorskip(package, reason=f"{package} is not installed (see the extra `peers`)")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory):
    """Its latents are 16x16: 256 tokens at level 0, 64 at level 1."""
    return tiny.pipeline("sd", tmp_path_factory.mktemp("pipe"))


def arguments(steps: int) -> dict:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return dict(prompt=["a", "b"], num_inference_steps=steps, guidance_scale=3.0, generator=generators,
                output_type="latent", height=32, width=32)  # fmt: skip


def latents(draw, steps: int = 10) -> torch.Tensor:
    return draw(**arguments(steps)).images


@pytest.fixture(scope="module")
def exact(pipe) -> dict[int, torch.Tensor]:
    """By number of steps."""
    return {steps: latents(pipe, steps) for steps in (4, 10)}


def state(pipe) -> list:
    """Everything that a variant could leave changed."""
    modules = [
        (id(m), type(m), id(getattr(m, "processor", None)), sorted(m.__dict__), len(m._forward_pre_hooks))
        for m in pipe.unet.modules()
    ]
    return [sorted(pipe.__dict__), torch.get_rng_state().tolist(), *modules]


@pytest.mark.parametrize("name", ALL)
def test_a_variant_changes_the_latents_and_leaves_everything_as_it_was(pipe, exact, name):
    needs(name)
    before = state(pipe)
    steps = 10 if "steps" in name else 4
    with apply(name, pipe, SETTING) as draw:
        found, again = latents(draw, steps), latents(draw, steps)
    assert found.isfinite().all()
    assert torch.equal(found, again), "a second run is not the first"
    assert torch.equal(found, exact[steps]) == (name == "sdpa")
    assert state(pipe) == before


@pytest.mark.parametrize("name", ["agent+deepcache-3", "agent+tgate", "tome-0.5", "keys-sampled", "tiles-2"])
def test_a_variant_is_undone_after_an_exception(pipe, name):
    needs(name)
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt), apply(name, pipe, SETTING) as draw:
        draw(callback_on_step_end=interrupt, **arguments(10))
    assert state(pipe) == before


def interrupt(pipe, step, timestep, kwargs):
    if step == 2:
        raise KeyboardInterrupt
    return {}


def test_tgate_asks_the_processors_of_agents_and_only_those(pipe):
    pytest.importorskip("tgate")
    with apply("tgate", pipe, SETTING) as draw:
        alone = latents(draw)
    with apply("agent+tgate", pipe, SETTING) as draw:
        latents(draw)
        report = find_patch(pipe).report()
    accelerated = [layer for layer in report.layers if layer.accelerated]
    assert {layer.level for layer in accelerated} == {0}  # level 1 has as many tokens as there are agents
    with diffattn.patch(pipe, min_tokens=10**9), warnings.catch_warnings():  # every layer passes through
        warnings.simplefilter("ignore", diffattn.DiffAttnWarning)
        with apply("tgate", pipe, SETTING) as draw:
            assert torch.equal(latents(draw), alone)


def test_deepcache_with_a_full_step_every_time_is_exact(pipe, exact):
    pytest.importorskip("DeepCache")
    with apply("deepcache-1", pipe, SETTING) as draw:
        assert torch.equal(latents(draw), exact[10])


def test_deepcache_skips_layers_in_the_steps_between(pipe):
    pytest.importorskip("DeepCache")
    calls = []
    hook = pipe.unet.mid_block.attentions[0].register_forward_hook(lambda *_: calls.append(1))
    with apply("deepcache-3", pipe, SETTING) as draw:
        latents(draw)
    hook.remove()
    assert len(calls) == 4  # of 10 steps: 0, 3, 6, 9


def oracle(x: torch.Tensor, allowed: torch.Tensor, attn) -> torch.Tensor:
    """Self-attention of one layer where token i sees the tokens that row i of `allowed` names."""
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def layer(pipe):
    """(attention of level 0, tokens [2, 64, C], rows [64], columns [64])"""
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 64, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    place = torch.arange(64)
    return attn, x, place // 8, place % 8


def test_sampled_keys_are_those_of_every_second_row_and_column(layer):
    attn, x, row, column = layer
    allowed = ((row % 2 == 0) & (column % 2 == 0)).expand(64, 64)
    found = DownsampledKeys(AttnProcessor2_0(), partial(sampled, factor=2))(attn, x)
    torch.testing.assert_close(found, oracle(x, allowed, attn))


@cases("todo_")
def test_sampled_keys_match_the_published_implementation(case):
    p = case.params
    attn = Attention(query_dim=p["C"], heads=p["heads"], dim_head=p["dim_head"])
    attn.load_state_dict({name.removeprefix("w."): x for name, x in case.tensors.items() if name.startswith("w.")})
    case.assert_close(sampled(case["in.x"], p["factor"]), "out.downsampled")
    found = DownsampledKeys(AttnProcessor2_0(), partial(sampled, factor=p["factor"]))(attn, case["in.x"])
    case.assert_close(found, "out.y")


def test_tokens_of_a_tile_see_each_other_and_no_others(layer):
    attn, x, row, column = layer
    tile = row // 4 * 2 + column // 4
    found = TiledAttention(AttnProcessor2_0(), 2)(attn, x)
    torch.testing.assert_close(found, oracle(x, tile[:, None] == tile, attn))


def test_pooled_keys_are_means_of_projected_keys(layer):
    attn, x, row, column = layer
    cell = row // 2 * 4 + column // 2
    mean = torch.nn.functional.one_hot(cell).float().T / 4  # [16, 64]
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    out = (q @ (mean @ k).mT * q.shape[-1] ** -0.5).softmax(-1) @ (mean @ v)
    found = DownsampledKeys(AttnProcessor2_0(), partial(pooled, factor=2))(attn, x)
    torch.testing.assert_close(found, attn.to_out[0](out.transpose(1, 2).flatten(2)))


def test_tiles_are_joined_as_they_were_cut():
    x = torch.arange(2 * 36).reshape(2, 36, 1)
    assert cut(x, 3).shape == (18, 4, 1)
    assert cut(x, 3)[1].flatten().tolist() == [2, 3, 8, 9]
    assert torch.equal(join(cut(x, 3), 3), x)
    with pytest.raises(ValueError, match="6x6 tokens does not divide into 4x4"):
        cut(x, 4)


def test_grids_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square pictures only"):
        sampled(torch.zeros(1, 8, 4), 2)


@pytest.mark.parametrize("name", ["nonsense", "tome", "tome-x", "keys-halved", "agent-best", "agent+", "steps-ten"])
def test_unknown_variants(name):
    with pytest.raises(ValueError, match="unknown variant"):
        check_names([name])


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("steps-17", 10, "17 of 20 is no whole number of 10 steps"),
        ("deepcache-5", 6, "2 of 6 steps would be full, of 20 steps 4"),
    ],
)
def test_what_a_short_run_cannot_stand_for_is_left_out(pipe, name, steps, message):
    needs(name)
    with pytest.raises(LeftOut, match=message), apply(name, pipe, Setting(steps=steps)):
        pass


@pytest.mark.parametrize(
    ("name", "package"), [("tome-0.5", "tomesd"), ("deepcache-3", "DeepCache"), ("tgate", "tgate")]
)
def test_peers_that_are_not_installed_say_how_to_get_them(pipe, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LeftOut, match=f"pip install --no-deps .*{package}=="), apply(name, pipe, SETTING):
        pass


def test_the_built_in_prompts_do_not_overlap():
    trained, held_out = builtin_prompts("trained"), builtin_prompts("held-out")
    assert len(set(trained)) == len(set(held_out)) == 64
    assert not set(trained) & set(held_out)


# The program, on a tiny model.


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
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
    xl = {key: MODELS["sdxl"].config[key] for key in ("use_linear_projection", "addition_embed_type")}
    xl |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    monkeypatch.setitem(MODELS, "tinyxl", replace(MODELS["tiny"], config={**MODELS["tiny"].config, **xl}))
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
