"""What the web page does, without the page: refusals, one job at a time, Stop, clean models, bounded memory."""

import gc
import math
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from support import web

from diffattn.app.jobs import Comparison, Drawn, JobProgress, Limits, Models, Worker, accelerations
from diffattn.app.jobs.compare import WARMING_UP, compare
from diffattn.app.jobs.preview import Preview
from diffattn.app.jobs.snippet import snippet
from diffattn.app.jobs.stops import Stop
from diffattn.app.jobs.watch import Audience, Watch
from diffattn.app.jobs.worker import save_pictures
from diffattn.drawing.loading import load_pipeline
from diffattn.drawing.request import UNPATCHED, Request, record_of
from diffattn.patching.patch import Patch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named as the code shown calls it."""
    folder = web.save_models(tmp_path_factory.mktemp("jobs") / "MODELS_DIR", side=64)
    return web.save_sits(folder, "sit")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Worker:
    return web.tiny_worker(folder)


# Refusals


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"steps": 401}, {"steps": 1e300}, {"steps": 2.5}, {"steps": True}, {"steps": "9"},
        {"steps": math.nan}, {"steps": None}, {"guidance": math.nan}, {"guidance": math.inf}, {"guidance": -1},
        {"guidance": "x"}, {"width": 10**9}, {"width": -8}, {"height": math.nan}, {"seed": -1}, {"seed": 2**64},
        {"seed": [1]}, {"num_images": 5}, {"num_images": 0}, {"prompt": "x" * 101}, {"prompt": None},
        {"prompt": {"a": 1}}, {"negative_prompt": 3}, {"acceleration": "agent/none"}, {"acceleration": ["agent"]},
        {"acceleration": None},
    ],
    ids=str,
)  # fmt: skip
def test_limits_refuse_what_is_out_of_range_or_of_another_type(worker: Worker, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).replace("_", " ") if "num" not in str(bad) else "pictures"):
        web.ask(worker, **bad)


def test_every_acceleration_offered_makes_a_request() -> None:
    for name in accelerations():
        assert Limits().request("emoji-sd", "", acceleration=name).steps == 25


@pytest.mark.parametrize("bad", [[], "agent/fast", None, ["none"], ["x"], [3]], ids=str)
def test_a_comparison_needs_accelerations(bad: Any) -> None:
    with pytest.raises(ValueError, match="acceleration"):
        Limits().variants_of(bad)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../one", "../../etc", "/etc/passwd", "one/../one", "./one", "group", "group/three/four", "outside",
     None, 3, ["one"], "\0", "tests/fixtures", "https://example.org/x", "a/..", "x" * 300, "x" * 300 + "/y",
     "𠮷" * 90 + "/y"],
)  # fmt: skip
def test_models_outside_the_folder_are_refused(folder: Path, tmp_path: Path, name: Any) -> None:
    shutil.copytree(folder, tmp_path / "models")
    shutil.move(tmp_path / "models" / "one", tmp_path / "elsewhere")
    (tmp_path / "models" / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models" / "group" / "three").mkdir()
    with pytest.raises(ValueError, match="model"):
        Models(tmp_path / "models").source(name)


def test_models_that_may_be_chosen(folder: Path) -> None:
    models = Models(folder)
    assert {"one", "group/two"} <= set(models.names())
    assert Path(models.source("group/two")) == (folder / "group" / "two").resolve()
    assert models.source("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="not available here"):
        Models(folder, hub=False).source("owner/name")
    assert models.describe("one").size == (64, 64)


@pytest.mark.parametrize(
    ("stored", "found"), [("2", 2.0), ("NaN", None), ("1e999", None), ("true", None), ('"2"', None)]
)
def test_the_guidance_that_a_model_recommends_is_a_number_or_not_known(
    tmp_path: Path, stored: str, found: float | None
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model_index.json").write_text(f'{{"_class_name": "SiTPipeline", "guidance_scale": {stored}}}')
    assert Models(tmp_path).describe("one").guidance == found


def test_a_pickle_is_refused_and_the_next_job_runs(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models"))
    unet = tmp_path / "models" / "group" / "two" / "unet"
    torch.save({}, unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"refused: 'group/two/unet/.*pickle") as refused:
        list(worker.generate("a", web.ask(worker, model="group/two")))
    assert str(tmp_path) not in str(refused.value)
    assert isinstance(list(worker.generate("a", web.ask(worker)))[-1], Drawn)


def test_a_recipe_that_cannot_be_read_is_told_by_its_name(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "y.json"):
        with pytest.raises(ValueError, match=f"recipe '{name}' is not a readable JSON file") as refused:
            web.ask(worker, recipe=str(tmp_path / name))
        assert str(tmp_path) not in str(refused.value)


# Drawing


def test_progress_previews_pictures_and_their_recipe(worker: Worker, tmp_path: Path) -> None:
    events = list(worker.generate("a", web.ask(worker, prompt="𠮷" * 99, num_images=2, acceleration="agent/fast")))
    steps = [event for event in events if isinstance(event, JobProgress)]
    drawn = events[-1]
    assert isinstance(drawn, Drawn)
    assert any(step.preview is not None for step in steps)
    assert steps[-1].seconds_left == 0
    assert len(drawn.pictures) == 2
    files = save_pictures(drawn.pictures, tmp_path)
    assert [record_of(file)["seed"] for file in files] == [0, 1]
    assert drawn.trace.accelerated[0].count(True) > 0
    assert len(drawn.trace.layers) == len(drawn.trace.accelerated[0])
    assert drawn.trace.numbers == [16, 16]
    assert worker.estimates.seconds_for(drawn.request) is not None


@pytest.mark.parametrize("how", ["none", "agent/fast", "recipe"])
def test_the_code_shown_draws_the_same_picture(
    worker: Worker, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_agents": 4, "agent_ratio": None, "max_head_error": 10.0, "min_tokens": 0}
    recipe = {"method": "agent", "options": options, "schedule": {"0.5": {}, "0": "exact"}, "protocol": {}}
    chosen = {"recipe": recipe} if how == "recipe" else {"acceleration": how}
    drawn: Any = list(worker.generate("a", web.ask(worker, seed=3, **chosen)))[-1]
    monkeypatch.chdir(folder.parent)
    check_the_code(drawn, folder)


@pytest.mark.parametrize("model", ["group/two", "sit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_code_shown_has_the_dtype_and_device(
    folder: Path, model: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Models(folder), device=device, dtype="bfloat16")
    drawn: Any = list(worker.generate("a", web.ask(worker, model=model, prompt="1")))[-1]
    monkeypatch.chdir(folder.parent)
    check_the_code(drawn, folder)
    assert "torch.bfloat16" in drawn.code
    assert ("pipe.to('cuda')" in drawn.code) == (device == "cuda")
    assert "pipe.to('cuda')" in snippet(drawn.request, device="cuda")


def test_the_code_shown_for_an_embedded_model_needs_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Worker(device="cpu")
    name = next(iter(worker.models.names()), None)
    if name is None:
        pytest.skip("no embedded model is installed")
    drawn: Any = list(worker.generate("a", web.ask(worker, model=name, steps=1)))[-1]
    monkeypatch.chdir(tmp_path)
    check_the_code(drawn, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "names_it"),
    [({"options": {"num_mediators": 4}}, False), ({"method": "mediator"}, True), ({"diffattn_recipe": 1}, True)],
)
def test_the_code_shown_says_the_method_unless_the_recipe_does(recipe: dict[str, Any], names_it: bool) -> None:
    code = snippet(Request("m", "1", method="mediator", recipe=recipe))
    said = "" if names_it else "'mediator', "
    assert f"diffattn.patch(pipe, {said}recipe={recipe})" in code


def check_the_code(drawn: Drawn, folder: Path) -> None:
    assert str(folder.parent) not in drawn.code
    names: dict[str, Any] = {}
    exec(drawn.code, names)
    assert names["pipe"].dtype == getattr(torch, drawn.pictures[0].record["dtype"])
    assert np.array_equal(np.asarray(names["image"]), np.asarray(drawn.pictures[0].image))


def test_the_preview_looks_like_the_picture() -> None:
    if "emoji-sd" not in Models().names():
        pytest.skip("the embedded model is not installed")
    worker = Worker(device="cpu")
    events: Any = list(worker.generate("a", worker.limits.request("emoji-sd", "T-Rex", steps=1, acceleration="none")))
    sketch = next(event.preview for event in events if isinstance(event, JobProgress) and event.preview)
    a, b = (np.asarray(x.resize((32, 32)), np.float32).ravel() for x in (sketch, events[-1].pictures[0].image))
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_a_vae_that_overflows_has_no_preview_but_pictures(tmp_path: Path) -> None:
    folder = web.save_models(tmp_path / "models")
    pipe: Any = load_pipeline(str(folder / "one"))
    torch.nn.init.constant_(pipe.vae.encoder.conv_in.weight, torch.inf)
    pipe.save_pretrained(folder / "one")
    worker = web.tiny_worker(folder)
    events = list(worker.generate("a", web.ask(worker)))
    assert [event.preview for event in events if isinstance(event, JobProgress)] == [None] * (len(events) - 1)
    assert isinstance(events[-1], Drawn)


def test_a_vae_without_a_distribution_has_no_preview() -> None:
    blocks: dict[str, Any] = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    vae = AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks)
    assert Preview.of(SimpleNamespace(vae=vae)) is None


def test_a_picture_begins_when_the_one_before_is_whole(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    list(worker.generate("a", web.ask(worker)))
    vae, now = web.loaded(worker).vae, [0.0]
    decode = vae.decode

    def decode_slowly(*args: Any, **kwargs: Any) -> Any:
        now[0] += 100
        return decode(*args, **kwargs)

    monkeypatch.setattr("diffattn.app.jobs.watch.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(vae, "decode", decode_slowly)
    drawn: Any = list(worker.generate("a", web.ask(worker, num_images=2)))[-1]
    assert now == [200]
    assert drawn.trace.seconds == [0, 0]


def test_a_run_is_followed_without_copies_of_its_trace(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patch, "trace", None)
    drawn: Any = list(worker.generate("a", web.ask(worker, acceleration="agent/fast")))[-1]
    assert drawn.trace.numbers == [16, 16]
    assert None not in drawn.trace.noise_levels


def test_compare_draws_the_same_seeds_and_leaves_the_model_clean(worker: Worker) -> None:
    found = list(
        worker.compare("a", web.ask(worker, num_images=2, width=64, height=64), ["agent/fast", "agent/balanced"])
    )[-1]
    assert isinstance(found, Comparison)
    exact, fast, balanced = found.variants
    assert (exact.name, fast.name, balanced.name) == (UNPATCHED, "agent/fast", "agent/balanced")
    assert exact.gflops is not None
    assert fast.gflops is not None
    assert fast.gflops < exact.gflops
    assert [picture.seed for picture in fast.pictures] == [0, 1]
    assert fast.psnr is not None
    assert 10 < fast.psnr < 100
    assert found.speedup(fast) is None  # two pictures are too few
    assert fast.report is not None
    assert fast.report.layers_accelerated > 0
    hooks = web.traces_of_patching(web.loaded(worker))
    assert hooks[:2] == (0, 0)
    assert not any(name.startswith("diffattn") for name in hooks[2].values())


def test_warming_up_says_no_time_and_is_no_picture(worker: Worker) -> None:
    list(worker.generate("a", web.ask(worker)))
    pipe, events = web.loaded(worker), list[JobProgress]()

    def watch(ready: Request, patch: Patch | None, *of_the_job: Any) -> Watch:
        return Watch(pipe, ready, patch, Audience(Stop(), events.append), *of_the_job)

    compare(pipe, web.ask(worker, num_images=2), ["agent/fast"], watch)
    told = {what: [x for x in events if x.what == what] for what in (WARMING_UP, UNPATCHED)}
    assert {(x.picture, x.pictures, x.seconds_left) for x in told[WARMING_UP]} == {(0, 1, None)}
    assert {x.pictures for x in told[UNPATCHED]} == {4}
    assert told[UNPATCHED][-1].seconds_left is not None


@pytest.mark.parametrize(("of_pairs", "mean"), [((20.0, math.inf, 30.0), 25), ((math.inf,) * 3, math.inf)])
def test_the_mean_psnr_is_of_the_pictures_that_differ(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, of_pairs: tuple[float, ...], mean: float
) -> None:
    monkeypatch.setattr("diffattn.app.jobs.compare.psnr", lambda a, b: torch.tensor(of_pairs))
    found: Any = list(worker.compare("a", web.ask(worker, num_images=3), ["agent/fast"]))[-1]
    assert found.variants[1].psnr == mean


@pytest.mark.parametrize("per_sample", [False, True])
def test_operations_are_not_counted_where_the_change_of_the_latents_decides(worker: Worker, per_sample: bool) -> None:
    entries = [{"num_mediators": 4}, {"num_mediators": 16}]
    schedule = {"kind": "latent_change", "entries": entries, "thresholds": [0.9], "first": 1, "per_sample": per_sample}
    asked = web.ask(worker, model="sit", prompt="1", steps=6, recipe={"method": "mediator", "schedule": schedule})
    found: Any = list(worker.compare("a", asked, ["recipe"]))[-1]
    exact, switched = found.variants
    assert exact.gflops is not None
    assert switched.gflops is None


# Clean models, bounded memory


def test_a_failed_job_leaves_the_model_clean(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    list(worker.generate("a", web.ask(worker)))
    pipe, before = web.loaded(worker), web.traces_of_patching(web.loaded(worker))
    decode, pipe.vae.decode = pipe.vae.decode, None  # fails after the last step
    try:
        with pytest.raises(TypeError):
            list(worker.generate("a", web.ask(worker, acceleration="agent/fast")))
    finally:
        del pipe.vae.decode
    assert pipe.vae.decode == decode
    assert web.traces_of_patching(pipe) == before
    (said,) = caplog.records  # it may be a bug
    assert said.message.startswith("drawing failed\n")
    assert said.message.endswith("TypeError")
    assert "in decode" in said.message or "self.vae.decode(" in said.message
    assert said.exc_info is None  # its message may quote the visitor
    with pytest.raises(ValueError, match="multiple of 8"):
        list(worker.generate("a", web.ask(worker, width=33)))
    assert web.traces_of_patching(pipe) == before
    assert len(caplog.records) == 1


def test_fifty_switches_of_the_model_keep_one_in_memory(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_sits(tmp_path / "models", "one", "two"))
    seen: list[weakref.ref[Any]] = []
    gc.freeze()  # the worker collects at every switch: only what is made here, or it takes a minute
    try:
        for i in range(50):
            list(worker.generate("a", web.ask(worker, model=("one", "two")[i % 2], prompt="1", steps=1)))
            seen.append(weakref.ref(web.loaded(worker).transformer))
        gc.collect()
    finally:
        gc.unfreeze()
    assert sum(ref() is not None for ref in seen) == 1
