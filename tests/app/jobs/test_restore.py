"""Settings restored from a picture's file, and the refusal of hostile files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from support import web

from diffattn.app.jobs import Drawn, Limits, Models, Worker
from diffattn.app.jobs.restore import as_recorded, record_of_file, settings_of_record
from diffattn.app.jobs.suited import check_suited, plain_name, suited_accelerations
from diffattn.app.jobs.worker import save_pictures
from diffattn.drawing.loading import embedded_folder
from diffattn.drawing.request import PNG_KEY


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return web.tiny_worker(web.save_models(tmp_path_factory.mktemp("restore") / "models"), prompt=1000)


RECIPE = {"method": "agent", "options": {"num_agents": 4, "agent_ratio": None, "max_head_error": 10.0, "min_tokens": 0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{"acceleration": "none"}, {"acceleration": "agent/fast"}, {"acceleration": "automatic"}, {"recipe": RECIPE}]
)
def test_a_picture_drawn_from_its_own_file_is_the_same(worker: Worker, tmp_path: Path, way: dict[str, Any]) -> None:
    asked = web.ask(worker, seed=7, steps=3, width=64, height=32, negative_prompt="a dog", **way)
    first: Any = list(worker.generate("a", asked))[-1]
    (path,) = save_pictures(first.pictures, tmp_path)
    found = settings_of_record(record_of_file(path), worker.models, worker.limits)
    assert (found["prompt"], found["seed"], found["width"], found["num_images"]) == ("a cat", 7, 64, 1)
    again = list(worker.generate("a", worker.limits.request(**found)))[-1]
    assert isinstance(again, Drawn)
    assert again.pictures[0].image.tobytes() == first.pictures[0].image.tobytes()


@pytest.mark.parametrize("guidance", [0, 0.5])
def test_a_picture_without_guidance_is_drawn_again_without(worker: Worker, guidance: float) -> None:
    asked = web.ask(worker, width=64, height=64, guidance=guidance, acceleration="none")
    first: Any = list(worker.generate("a", asked))[-1]
    record = dict(first.pictures[0].record)
    assert record["guidance"] == guidance
    settings: Any = settings_of_record(record, worker.models, worker.limits)
    assert settings["guidance"] == 1  # 0 would be the model's own on the page
    again: Any = list(worker.generate("a", worker.limits.request(**settings)))[-1]
    assert again.pictures[0].image.tobytes() == first.pictures[0].image.tobytes()


@pytest.mark.slow
def test_the_code_of_a_picture_names_what_was_decided(worker: Worker) -> None:
    drawn: Any = list(worker.generate("a", web.ask(worker, width=64, height=64, acceleration="agent/fast")))[-1]
    decisions = drawn.pictures[0].record["decisions"]
    assert decisions
    assert f"decisions={decisions}" in drawn.code


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # that nothing is accelerated
@pytest.mark.parametrize("faster", [True, False])
def test_a_picture_drawn_again_follows_the_decisions_in_its_record(worker: Worker, faster: bool) -> None:
    asked = web.ask(worker, seed=7, width=64, height=64, acceleration="agent/fast")
    first: Any = list(worker.generate("a", asked))[-1]
    record = dict(first.pictures[0].record)
    assert record["decisions"]
    record["decisions"] = dict.fromkeys(record["decisions"], faster)  # as on another machine
    settings: Any = settings_of_record(record, worker.models, worker.limits)
    same = as_recorded(worker.limits.request(**settings | {"num_images": 2}), record, worker.models, worker.limits)
    again: Any = list(worker.generate("a", same))[-1]
    assert again.pictures[0].record["decisions"] == record["decisions"]
    assert (again.report.layers_accelerated > 0) == faster
    assert f"decisions={record['decisions']}" in again.code
    other = worker.limits.request(**settings | {"seed": 8})
    assert as_recorded(other, record, worker.models, worker.limits) is other
    assert as_recorded(other, None, worker.models, worker.limits) is other


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"recipe": "/etc/passwd"}, "a recipe must be an object"),
        ({"model": "../../etc"}, "not available here"),
        ({"model": ["one"]}, "choose a model"),
        ({"width": 10**6}, "width must be"),
        ({"prompt": 7}, "prompt must be text"),
        ({"method": "agent", "options": {"code": 1}, "preset": None, "recipe": {"x": 1}}, "unknown recipe key"),
        ({"decisions": ["x"]}, "decisions must be a mapping"),
        ({"decisions": {"x": "yes"}}, "true .* false"),
        ([], "is not an object"),
        ("[" * 10**5, "nested|JSON|Expecting"),
    ],
    ids=str,
)
def test_hostile_files_are_refused_in_words(worker: Worker, tmp_path: Path, record: Any, says: str) -> None:
    good = {"model": "one", "prompt": "a cat", "method": "none", "steps": 2, "seed": 0}
    text = record if isinstance(record, str) else json.dumps(good | record if isinstance(record, dict) else record)
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ValueError, match=says) as refused:
        settings_of_record(record_of_file(tmp_path / "x.png"), worker.models, worker.limits)
    assert str(tmp_path) not in str(refused.value)


def test_a_picture_without_a_record_says_so(worker: Worker, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"'x\.png' carries no diffattn record"):
        settings_of_record(record_of_file(tmp_path / "x.png"), worker.models, worker.limits)


def test_options_that_no_acceleration_has_come_back_as_a_recipe(worker: Worker) -> None:
    record = {
        "model": "one",
        "prompt": "",
        "method": "agent",
        "preset": "fast",
        "options": {"num_agents": 4},
        "steps": 2,
    }
    found = settings_of_record(record | {"seed": 0, "steps": 2}, worker.models, worker.limits)
    assert found["recipe"] == {"method": "agent", "preset": "fast", "options": {"num_agents": 4}}


def test_a_prompt_that_is_cut_names_what_is_left_out(worker: Worker) -> None:
    long: Any = list(worker.generate("a", web.ask(worker, prompt="word " * 100 + "unread")))[-1]
    assert long.unread.endswith("unread")
    assert len(long.unread) < 500
    short: Any = list(worker.generate("a", web.ask(worker)))[-1]
    assert short.unread == ""


def test_accelerations_are_told_from_a_models_files() -> None:
    emoji, cifar = (embedded_folder(name) for name in ("emoji-sd", "cifar-sit"))
    assert {name.partition("/")[0] for name in suited_accelerations(emoji)[2:]} == {"agent", "inline", "keys", "tiles"}
    assert {name.partition("/")[0] for name in suited_accelerations(cifar)[2:]} == {"mediator"}
    assert plain_name("agent/fast", "agent") == "Fast"
    assert plain_name("agent/fast") == "Fast (agent)"
    assert plain_name("none") == "Exact (no acceleration)"
    with pytest.raises(ValueError, match="does not work for model 'cifar-sit'"):
        check_suited(web.Worker(device="cpu").models, "cifar-sit", ["agent/fast"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_out_channels": [7, 7]}, "'group/two' could not be loaded: num_channels"),
        ({"attention_head_dim": 0}, "'group/two' could not be loaded: integer division"),
        ({"sample_size": "big"}, "sample_size of a denoiser is one number or two, got 'big'"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_loaded_leaves_the_next_one_alone(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = web.save_models(tmp_path / "models")
    config = folder / "group" / "two" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    worker = Worker(Models(folder), Limits(side=64, steps=4), "cpu", "bfloat16")
    with pytest.raises(ValueError, match=says):
        list(worker.generate("a", web.ask(worker, model="group/two")))
    assert torch.get_default_dtype() == torch.float32
    assert isinstance(list(worker.generate("a", web.ask(worker)))[-1], Drawn)


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("model_index.json", "[]", "names no pipeline class"),
        ("model_index.json", '{"_class_name": 7}', "names no pipeline class"),
        ("model_index.json", '{"_class_name": "SiTPipeline", "id2label": ["a"]}', "id2label .* is not an object"),
        ("model_index.json", f'{{"_class_name": "SiTPipeline", "x": {DEEP}}}', "nested more than 32 deep"),
        ("unet/config.json", "[1]", "does not contain a JSON object"),
        ("unet/config.json", f'{{"x": {DEEP}}}', "nested more than 32 deep"),
        ("vae/config.json", '"x"', "does not contain a JSON object"),
        ("tokenizer/tokenizer_config.json", "[]", "could not be loaded"),
    ],
    ids=lambda value: value[:40],
)
def test_malformed_models_are_refused_with_a_sentence(tmp_path: Path, file: str, text: str, says: str) -> None:
    folder = web.save_models(tmp_path / "models")
    (folder / "one" / file).write_text(text)
    worker = web.tiny_worker(folder)
    worker.models.describe("one")  # the page shows what it can
    suited_accelerations(worker.models.place("one"))
    with pytest.raises(ValueError, match=says) as refused:
        list(worker.generate("a", web.ask(worker)))
    assert str(tmp_path) not in str(refused.value)
    assert "\n" not in str(refused.value)
