"""`diffattn convert`: every layout to every other with the same outputs, options that weights leave open, refusals."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from support.reference import Case
from support.tiny_dit import dit_cases, inputs, run, tiny_dit, weights
from typer.testing import CliRunner, Result

from diffattn.cli import app
from diffattn.models import DiT
from diffattn.models.convert_files import HEADS

SOFTMAX = dict(attention="softmax", learn_sigma=True, prediction="epsilon", time_direction="data_to_noise")


def convert(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def converted(*words: object) -> Result:
    done = convert(*words)
    assert done.exit_code == 0, done.output
    return done


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(weight, b.state_dict()[name]) for name, weight in a.state_dict().items())


def load(folder: Path) -> DiT:
    return DiT.from_pretrained(folder, use_safetensors=True)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """An official mediator checkpoint in safetensors."""
    save_file(tiny_dit(mediators=[4]).to_official(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


# Every layout to every other.


@dit_cases("mediator_sit_", "sit_official", "dit_official")
def test_official_weights_become_a_folder_with_the_published_outputs_and_come_back(case: Case, tmp_path: Path) -> None:
    prediction = "epsilon" if case.name.startswith("dit") else "velocity"
    save_file(weights(case), tmp_path / "in.safetensors")
    heads = () if "mediator_num" in case.params else ("--num-heads", case.params["num_heads"])  # biases tell
    converted(tmp_path / "in.safetensors", tmp_path / "model", "--prediction", prediction, *heads)
    model = load(tmp_path / "model")
    case.assert_close(run(model, case["in.x"], case["in.t"], case["in.y"]), "out.forward")
    converted(tmp_path / "model", tmp_path / "out.safetensors", "--to", "official")
    back = load_file(tmp_path / "out.safetensors")
    assert back.keys() == weights(case).keys()
    for name, weight in weights(case).items():
        torch.testing.assert_close(back[name], weight, atol=1e-6 if name == "pos_embed" else 0, rtol=0)


@pytest.mark.slow
def test_diffusers_and_back(tmp_path: Path) -> None:
    tiny_dit(**SOFTMAX, frequency_shift=1.0, norm_eps=1e-5).save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "theirs").eval()
    x, _, y = inputs()
    batch = (x, torch.tensor([3, 999]), y)
    torch.testing.assert_close(run(theirs, *batch), run(load(tmp_path / "ours"), *batch), atol=1e-4, rtol=1e-4)
    converted(tmp_path / "theirs", tmp_path / "again")
    same(load(tmp_path / "again"), load(tmp_path / "ours"))
    assert load(tmp_path / "again").config["prediction"] == "epsilon"
    converted(tmp_path / "theirs", tmp_path / "w.safetensors", "--to", "official")
    assert load_file(tmp_path / "w.safetensors").keys() == load(tmp_path / "ours").to_official().keys()


def test_other_frequencies_of_time_are_told_of_when_diffusers_gets_the_model(tmp_path: Path) -> None:
    tiny_dit(**SOFTMAX).save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="diffusers' DiT has the time frequencies"):
        converted(tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers")


@pytest.mark.slow
def test_the_path_is_told_where_a_layout_has_no_room_for_it(tmp_path: Path) -> None:
    tiny_dit(**SOFTMAX, path="gvp", frequency_shift=1.0).save_pretrained(tmp_path / "ours")
    options = ("--path", "gvp", "--prediction", "velocity")
    for layout, there, heads in (("official", "w.safetensors", ("--num-heads", 3)), ("diffusers", "theirs", ())):
        converted(tmp_path / "ours", tmp_path / there, "--to", layout)
        converted(tmp_path / there, tmp_path / layout, *options, *heads)
        assert load(tmp_path / layout).config["path"] == "gvp"
        converted(tmp_path / there, tmp_path / f"{layout}-2", *heads)
        assert load(tmp_path / f"{layout}-2").config["path"] == "linear"


@pytest.mark.parametrize("n", [4, 9, 64])
def test_an_elastic_model_gives_an_official_file_of_any_number_of_mediators(n: int, tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "w.safetensors", "--to", "official", "--num-mediators", n)
    assert load_file(tmp_path / "w.safetensors")["blocks.0.attn.an_bias"].shape[1] == n


def test_precision(official: Path, tmp_path: Path) -> None:
    converted(official, tmp_path / "half", "--dtype", "bfloat16")
    stored = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    converted(tmp_path / "half", tmp_path / "w.safetensors", "--to", "official")  # and stays as it is
    assert {weight.dtype for weight in load_file(tmp_path / "w.safetensors").values()} == {torch.bfloat16}


def test_what_it_prints_and_writes_as_json(official: Path, tmp_path: Path) -> None:
    done = converted(official, tmp_path / "new" / "model", "--json", tmp_path / "x.json")
    told = json.loads((tmp_path / "x.json").read_text())
    assert (told["from"], told["to"]) == ("official", "diffattn")
    assert told["config"]["mediators"] == [4]
    assert told["parameters"] == sum(p.numel() for p in load(tmp_path / "new" / "model").parameters())
    for part in ("official -> diffattn", "2 mediator", "mediators 4", "velocity", str(tmp_path / "new" / "model")):
        assert part in done.stdout
    assert sorted(x.name for x in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["model"]  # no temporary folder is left


# .pt files.


PICKLES: dict[str, Callable[[dict[str, Any], dict[str, Any]], tuple[Any, tuple[str, ...]]]] = {
    "weights alone": lambda ours, other: (OrderedDict(ours), ()),
    "average and weights": lambda ours, other: ({"ema": ours, "model": other, "steps": 3}, ()),
    "only the weights of training": lambda ours, other: ({"model": ours, "opt": {"state": {}}}, ()),
    "a key that is named": lambda ours, other: ({"ema": other, "model": ours}, ("--key", "model")),
    "arguments of a program": lambda ours, other: ({"ema": ours, "args": argparse.Namespace(lr=1e-4)}, ()),
    "names of parallel training": lambda ours, other: ({"model": {f"module.{k}": x for k, x in ours.items()}}, ()),
    "names of compiled training": lambda ours, other: ({f"_orig_mod.{k}": x for k, x in ours.items()}, ()),
    "Lightning": lambda ours, other: ({"state_dict": {f"model.{k}": x for k, x in ours.items()}}, ()),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pt_files(case: str, tmp_path: Path) -> None:
    model = tiny_dit(mediators=[4])
    ours = model.to_official()
    content, options = PICKLES[case](ours, {name: weight + 1 for name, weight in ours.items()})
    torch.save(content, tmp_path / "w.pt")
    converted(tmp_path / "w.pt", tmp_path / "model", *options)
    same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module.", "ema."])
def test_safetensors_follow_the_same_rule(prefix: str, tmp_path: Path) -> None:
    model = tiny_dit(mediators=[4])
    save_file({prefix + name: weight for name, weight in model.to_official().items()}, tmp_path / "w.safetensors")
    converted(tmp_path / "w.safetensors", tmp_path / "model")
    same(load(tmp_path / "model"), model)


class Code:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


class Restored:
    """Runs code when its state is set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["path"].touch()


MALICIOUS: dict[str, Callable[[Path], Any]] = {
    "a method": lambda ran: Code(Path.touch, ran),
    "a command": lambda ran: Code(os.system, f"touch {ran}"),
    "a builtin": lambda ran: Code(eval, f"open({str(ran)!r}, 'w')"),
    "a state": lambda ran: Restored(ran),
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("case", MALICIOUS)
def test_code_in_a_pt_file_is_not_run(case: str, raw: bool, tmp_path: Path) -> None:
    content = {"ema": tiny_dit().to_official(), "code": MALICIOUS[case](tmp_path / "ran")}
    if raw:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(content["code"]))
    else:
        torch.save(content, tmp_path / "w.pt")
    refused_in_one_sentence(tmp_path, "" if raw else "could run code")


def refused_in_one_sentence(place: Path, named: str) -> None:
    """`w.pt` there is refused without torch's advice, and nothing is written."""
    done = convert(place / "w.pt", place / "model")
    assert done.exit_code == 2
    assert "w.pt' is not read: it " in done.stderr
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not any(word in done.stderr for word in ("weights_only", "torch.load", "trusted", "PyTorch"))
    assert [x.name for x in place.iterdir()] == ["w.pt"]


RAW: dict[str, Callable[[Path], object]] = {
    "a pickle": lambda file: file.write_bytes(pickle.dumps({"a": [1, 2], "b": {"c": 0.5}})),
    "an old pickle": lambda file: file.write_bytes(pickle.dumps({"a": 1}, protocol=0)),
    "a pickled array": lambda file: file.write_bytes(pickle.dumps(np.zeros(3))),
    "text": lambda file: file.write_text("not a checkpoint"),
    "nothing": lambda file: file.write_bytes(b""),
    "a cut file": lambda file: (torch.save({"w": torch.zeros(999)}, file), file.write_bytes(file.read_bytes()[:2000])),
    "TorchScript": lambda file: torch.jit.script(torch.nn.Linear(2, 2)).save(file),
    "a whole model": lambda file: torch.save(torch.nn.Linear(2, 2), file),
}


@pytest.mark.parametrize("case", RAW)
def test_what_torch_cannot_read_as_weights_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    RAW[case](tmp_path / "w.pt")
    refused_in_one_sentence(tmp_path, "")


def test_a_folder_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_dit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = float("nan")  # type: ignore[union-attr, index]
    model.save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "model")
    assert done.exit_code == 2
    assert "NaN or infinite: blocks.0.mlp.fc1.bias (1 of 96 values)" in done.stderr
    assert not (tmp_path / "model").exists()


# The number of heads.


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12)])
def test_heads_are_those_of_the_published_size_with_this_width(width: int, heads: int, tmp_path: Path) -> None:
    assert HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16}
    model = tiny_dit(attention="softmax", hidden_size=width, num_heads=heads, num_layers=1, mlp_ratio=0.1)
    save_file(model.to_official(), tmp_path / "w.safetensors")
    converted(tmp_path / "w.safetensors", tmp_path / "model")
    assert load(tmp_path / "model").config["num_heads"] == heads


# What is there already.


def test_nothing_is_replaced_without_force(official: Path, tmp_path: Path) -> None:
    converted(official, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    tiny_dit().save_pretrained(tmp_path / "other")
    assert "--force replaces it" in convert(tmp_path / "other", tmp_path / "model").stderr
    assert (tmp_path / "model" / "config.json").read_text() == before
    converted(tmp_path / "other", tmp_path / "model", "--force")
    same(load(tmp_path / "model"), tiny_dit())
    assert convert(tmp_path / "other", official, "--to", "official").exit_code == 2
    converted(tmp_path / "other", official, "--to", "official", "--force")
    assert load_file(official)["blocks.0.attn.an_bias"].shape[1] == 64


def test_force_does_not_replace_a_folder_with_other_things(official: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    done = convert(official, tmp_path / "mine", "--force")
    assert done.exit_code == 2
    assert "contains other things than a model (thesis.txt)" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_model_can_be_converted_in_place(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "model", "--force", "--dtype", "bfloat16")
    assert {p.dtype for p in DiT.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


# Bad input.


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    official = tiny_dit(mediators=[4]).to_official()
    save_file(official, place / "m.safetensors")
    save_file(tiny_dit(attention="softmax").to_official(), place / "plain.safetensors")
    save_file({"conv.weight": torch.zeros(1)}, place / "other.safetensors")
    torch.save({"ema": official, "model": official}, place / "two.pt")
    torch.save({"steps": 3, "w": torch.zeros(1)}, place / "mixed.pt")
    torch.save([1, 2], place / "list.pt")
    torch.save(official, place / "m.bin")
    (place / "broken.pt").write_bytes(b"not a checkpoint")
    (place / "broken.safetensors").write_bytes(b"not a checkpoint")
    tiny_dit().save_pretrained(place / "ours")
    tiny_dit().save_pretrained(place / "cut")
    (place / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    tiny_dit().save_pretrained(place / "lacking")
    kept = load_file(place / "lacking" / "diffusion_pytorch_model.safetensors")
    del kept["blocks.1.mlp.fc1.bias"]
    save_file(kept, place / "lacking" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for name, config in (
        ("unet", '{"_class_name": "UNet2DModel"}'),
        ("garbled", "{"),
        ("hollow", '{"_class_name": "DiT"}'),
    ):
        (place / name).mkdir()
        (place / name / "config.json").write_text(config)
    (place / "pipeline").mkdir()
    (place / "pipeline" / "model_index.json").write_text("{}")
    (place / "empty").mkdir()
    return place


BAD = {
    "no source": ("{0}/nothing.pt {1}/x", "there is no file or folder"),
    "another suffix": ("{0}/m.bin {1}/x", "ends in .pt, .pth, .safetensors, got 'm.bin'"),
    "broken pt": ("{0}/broken.pt {1}/x", "broken.pt"),
    "broken safetensors": ("{0}/broken.safetensors {1}/x", "not a readable safetensors file"),
    "not by name": ("{0}/list.pt {1}/x", "contains a list"),
    "other tensors": ("{0}/mixed.pt {1}/x", "unexpected: w"),
    "unknown key": ("{0}/two.pt {1}/x --key best", "no weights under 'best'; there are: ema, model"),
    "key of safetensors": (
        "{0}/m.safetensors {1}/x --key ema",
        "no weights under 'ema'; there are: none apart",
    ),
    "something else": ("{0}/other.safetensors {1}/x", "missing weights"),
    "heads not told": ("{0}/plain.safetensors {1}/x", "a width of 24 is none of the published ones (384: 6"),
    "wrong heads": ("{0}/m.safetensors {1}/x --num-heads 4", "biases are those of 3 heads"),
    "no heads": ("{0}/m.safetensors {1}/x --num-heads 0", "num_heads must be 1 or more, got 0"),
    "prediction": ("{0}/m.safetensors {1}/x --prediction score", "velocity, epsilon, got 'score'"),
    "path": ("{0}/m.safetensors {1}/x --path vp", "path must be one of linear, gvp, got 'vp'"),
    "path of a folder": ("{0}/ours {1}/x --path gvp", "path: "),
    "classes": ("{0}/m.safetensors {1}/x --num-classes 9", "6 rows"),
    "size": ("{0}/m.safetensors {1}/x --sample-size 16x16x3", "32x64"),
    "size of another grid": ("{0}/m.safetensors {1}/x --sample-size 32", "16x16 grid"),
    "dtype": ("{0}/m.safetensors {1}/x --dtype float8", "float32, float16, bfloat16"),
    "layout": ("{0}/m.safetensors {1}/x --to onnx", "diffattn, official, diffusers, got 'onnx'"),
    "mediators of a folder": ("{0}/ours {1}/x --num-mediators 4", "applies to the official layout"),
    "mediators out of range": ("{0}/ours {1}/x.safetensors --to official --num-mediators 81", "from 4 to 64, got 81"),
    "options of a folder": ("{0}/ours {1}/x --num-heads 3 --prediction epsilon", "num_heads, prediction"),
    "diffusers has no mediators": ("{0}/ours {1}/x --to diffusers", "mediator layers"),
    "another class": ("{0}/unet {1}/x", "contains a UNet2DModel; what can be converted: DiT, DiTTransformer2DModel"),
    "garbled configuration": ("{0}/garbled {1}/x", "not a readable configuration"),
    "no weights": ("{0}/hollow {1}/x", "has no weights in .safetensors files"),
    "cut weights": ("{0}/cut {1}/x", "cut"),
    "missing weights": ("{0}/lacking {1}/x", "blocks.1.mlp.fc1.bias"),
    "a pipeline": ("{0}/pipeline {1}/x", "give the folder of its transformer"),
    "an empty folder": ("{0}/empty {1}/x", "it has no config.json"),
    "a file for a folder": ("{0}/m.safetensors {1}/x.pt", "is a folder, got the name of a file"),
    "a folder for a file": ("{0}/ours {1}/x --to official", "written as a .safetensors file"),
    "below a file": ("{0}/ours {0}/m.safetensors/x", "not a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(case: str, sources: Path, tmp_path: Path) -> None:
    line, named = BAD[case]
    before = sorted(sources.rglob("*"))
    done = convert(*line.format(sources, tmp_path).split())
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    told = done.stderr.strip().splitlines()
    assert len(told) == 1, done.stderr
    assert told[0].startswith("diffattn: ")
    assert named in told[0]
    assert not list(tmp_path.iterdir())
    assert sorted(sources.rglob("*")) == before


def test_help() -> None:
    done = convert("--help")
    assert done.exit_code == 0
    for part in ("SOURCE", "DEST", "--to", "[default: diffattn]", "--num-heads", "--json", "--force"):
        assert part in done.stdout
