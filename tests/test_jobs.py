"""What the web page does, without the page: refusals, one job at a time, Stop, clean models, bounded memory."""

import gc
import math
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import web

from diffattn.generation import EXACT, recipe_of
from diffattn.jobs import Comparison, Drawn, Limits, Models, Progress, Stopped, Worker, accelerations, snippet
from diffattn.jobs.worker import save_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return web.save_models(tmp_path_factory.mktemp("jobs") / "models")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Worker:
    return web.tiny_worker(folder)


def ask(worker: Worker, **changes: Any) -> Any:
    return worker.limits.request(**({"model": "one", "prompt": "a cat", "steps": 2, "acceleration": "none"} | changes))


def loaded(worker: Worker) -> Any:
    assert worker._loaded is not None
    return worker._loaded[1]


def traces_of_patching(pipe: Any) -> tuple[Any, ...]:
    processors = {name: type(p).__module__ for name, p in pipe.unet.attn_processors.items()}
    return len(pipe.unet._forward_pre_hooks), len(pipe.unet._forward_hooks), processors


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
        ask(worker, **bad)


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
     None, 3, ["one"], "\0", "tests/fixtures", "https://example.org/x", "a/.."],
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
    assert models.describe("one").size == (32, 32)


def test_a_pickle_is_refused_and_the_next_job_runs(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models"))
    unet = tmp_path / "models" / "group" / "two" / "unet"
    torch.save({}, unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickle"):
        list(worker.generate("a", ask(worker, model="group/two")))
    assert isinstance(list(worker.generate("a", ask(worker)))[-1], Drawn)


# Drawing


def test_progress_previews_pictures_and_their_recipe(worker: Worker, tmp_path: Path) -> None:
    events = list(worker.generate("a", ask(worker, num_images=2, acceleration="agent/fast")))
    steps = [event for event in events if isinstance(event, Progress)]
    drawn = events[-1]
    assert isinstance(drawn, Drawn)
    assert any(step.preview is not None for step in steps)
    assert steps[-1].seconds_left == 0
    assert len(drawn.pictures) == 2
    files = save_pictures(drawn.pictures, tmp_path)
    assert [recipe_of(file)["seed"] for file in files] == [0, 1]
    assert drawn.trace.accelerated[0].count(True) > 0
    assert len(drawn.trace.layers) == len(drawn.trace.accelerated[0])
    assert drawn.trace.numbers == [16, 16]
    assert worker.seconds_for(drawn.request) is not None


@pytest.mark.parametrize("acceleration", ["none", "agent/fast"])
def test_the_code_shown_draws_the_same_picture(worker: Worker, folder: Path, acceleration: str) -> None:
    drawn = list(worker.generate("a", ask(worker, acceleration=acceleration, seed=3)))[-1]
    code = snippet(drawn.request).replace("'one'", repr(str(folder / "one")))
    names: dict[str, Any] = {}
    exec(code, names)
    assert np.array_equal(np.asarray(names["image"]), np.asarray(drawn.pictures[0].image))


def test_the_preview_looks_like_the_picture() -> None:
    if "emoji-sd" not in Models().names():
        pytest.skip("the embedded model is not installed")
    worker = Worker(device="cpu")
    events = list(worker.generate("a", worker.limits.request("emoji-sd", "T-Rex", steps=1, acceleration="none")))
    sketch = next(event.preview for event in events if isinstance(event, Progress) and event.preview)
    pair = [np.asarray(x.resize((32, 32)), np.float32).ravel() for x in (sketch, events[-1].pictures[0].image)]
    assert np.corrcoef(*pair)[0, 1] > 0.9


def test_compare_draws_the_same_seeds_and_leaves_the_model_clean(worker: Worker) -> None:
    found = list(worker.compare("a", ask(worker, num_images=2, width=64, height=64), ["agent/fast", "agent/balanced"]))[
        -1
    ]
    assert isinstance(found, Comparison)
    exact, fast, balanced = found.variants
    assert (exact.name, fast.name, balanced.name) == (EXACT, "agent/fast", "agent/balanced")
    assert exact.gflops is not None
    assert fast.gflops is not None
    assert fast.gflops < exact.gflops
    assert [picture.seed for picture in fast.pictures] == [0, 1]
    assert fast.psnr is not None
    assert 10 < fast.psnr < 100
    assert found.speedup(exact) == 1
    assert fast.report is not None
    assert fast.report.layers_accelerated > 0
    hooks = traces_of_patching(loaded(worker))
    assert hooks[:2] == (0, 0)
    assert not any(name.startswith("diffattn") for name in hooks[2].values())


# Stop, errors, turns


def test_stop_ends_a_run_within_one_step_and_leaves_the_model_clean(worker: Worker) -> None:
    list(worker.generate("a", ask(worker)))
    before, steps = traces_of_patching(loaded(worker)), []

    def run() -> None:
        for event in worker.generate("a", ask(worker, steps=400, acceleration="agent/fast")):
            steps.append(event.step)
            if event.step and len(steps) < 4:
                assert not worker.stop("somebody else")
                assert worker.stop("a")

    with pytest.raises(Stopped):
        run()
    assert max(steps) < 100
    assert traces_of_patching(loaded(worker)) == before
    assert not worker.stop("a")


def test_an_iterator_that_is_closed_stops_its_job(worker: Worker) -> None:
    events = worker.generate("a", ask(worker, steps=400))
    next(events)
    events.close()  # waits for the job
    assert traces_of_patching(loaded(worker))[:2] == (0, 0)
    assert not any(thread.name == "diffattn-job" for thread in threading.enumerate())


def test_a_failed_job_leaves_the_model_clean(worker: Worker) -> None:
    list(worker.generate("a", ask(worker)))
    pipe, before = loaded(worker), traces_of_patching(loaded(worker))
    decode, pipe.vae.decode = pipe.vae.decode, None  # fails after the last step
    try:
        with pytest.raises(TypeError):
            list(worker.generate("a", ask(worker, acceleration="agent/fast")))
    finally:
        del pipe.vae.decode
    assert pipe.vae.decode == decode
    assert traces_of_patching(pipe) == before
    with pytest.raises(ValueError, match="multiple of 8"):
        list(worker.generate("a", ask(worker, width=33)))
    assert traces_of_patching(pipe) == before


def test_jobs_of_several_visitors_run_one_after_the_other(worker: Worker) -> None:
    asked = ask(worker, steps=4, acceleration="none")
    alone = np.asarray(list(worker.generate("x", asked))[-1].pictures[0].image)
    steps: list[tuple[str, int]] = []
    pictures: dict[str, Any] = {}

    def visit(name: str) -> None:
        for event in worker.generate(name, asked):
            if isinstance(event, Drawn):
                pictures[name] = np.asarray(event.pictures[0].image)
            else:
                steps.append((name, event.step))

    visitors = [threading.Thread(target=visit, args=(str(i),)) for i in range(3)]
    for thread in visitors:
        thread.start()
    for thread in visitors:
        thread.join()
    assert len(pictures) == 3
    assert all(np.array_equal(picture, alone) for picture in pictures.values())


def test_fifty_switches_of_the_model_keep_one_in_memory(worker: Worker) -> None:
    seen: list[weakref.ref[Any]] = []
    for i in range(50):
        with worker._model(("one", "group/two")[i % 2], lambda progress: None) as (pipe, _):
            seen.append(weakref.ref(pipe.unet))
        del pipe
    gc.collect()
    assert sum(ref() is not None for ref in seen) == 1
