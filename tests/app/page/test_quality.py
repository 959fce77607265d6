"""The endpoints that measure speed and quality, through Gradio's own client."""

# ruff: noqa: E402, the page needs Gradio

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import web

web.need_gradio()

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffattn.app.jobs import Worker
from diffattn.app.jobs.kept import MOST
from diffattn.app.jobs.quality_run import read_runs, save_runs
from diffattn.app.page.browser_runs import checked
from diffattn.app.page.shared import UNCOUNTED

AXIS = "GFLOPs per picture"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return web.tiny_worker(web.save_sits(tmp_path_factory.mktemp("web") / "models", "sit"))


@pytest.fixture
def client(address: str) -> Client:
    return Client(address, verbose=False)


def settings() -> Any:
    return dict(
        models=["sit"], accelerations=["mediator/fast"], numbers="4", samples=8, steps=2, guidance=None, prompts="",
        extractor="cifar-classifier", against="automatic", seed=0, labels=[], axis=AXIS,
    )  # fmt: skip


def test_measure_gives_charts_and_files_that_can_be_loaded_again(client: Client, address: str) -> None:
    stage, boxes, results, files = client.predict(**settings(), api_name="/measure")
    assert "Done: sit, 8 pictures, 2 steps" in stage
    assert "FID-8 (cifar-classifier" in results
    assert "mediator n=4" in results
    assert results.count("<svg class=") == 2
    data, rows = (Path(file) for file in files)
    run = read_runs(data)[0]
    assert boxes["value"] == [run.title]
    assert len(rows.read_text().splitlines()) == 4
    hidden, nothing = client.predict(labels=[], axis=AXIS, api_name="/show_runs")
    assert "No run is chosen" in hidden
    assert nothing is None

    other = Client(address, verbose=False)  # sees nothing of it until the file is loaded
    assert "sit, 8" not in str(other.predict(labels=[], axis=AXIS, api_name="/show_runs"))
    boxes, results, _ = other.predict(path=handle_file(str(data)), labels=[], axis=AXIS, api_name="/load_runs")
    assert boxes["value"] == [run.title]
    assert "mediator n=4" in results


def test_a_run_joins_what_its_visitor_did_meanwhile(client: Client, address: str) -> None:
    _, _, _, files = Client(address, verbose=False).predict(**settings(), api_name="/measure")
    (other,) = read_runs(Path(files[0]))
    job = client.submit(**(settings() | {"steps": 100}), api_name="/measure")
    end = time.monotonic() + 60
    while not any("step " in str(out[0]) for out in job.outputs()):
        assert time.monotonic() < end
        time.sleep(0.02)
    client.predict(path=handle_file(files[0]), labels=[], axis=AXIS, api_name="/load_runs")
    client.predict(labels=[other.title], axis="seconds per picture", api_name="/show_runs")
    assert not job.done()
    _, boxes, results, files = job.result()
    runs = read_runs(Path(files[0]))
    assert [run.title for run in runs] == boxes["value"]
    assert [run.lines[0].quality.protocol.steps for run in runs] == [100, 2]  # the newest first
    assert "against seconds per picture" in results


def test_runs_of_a_file_that_are_not_kept_are_counted(client: Client, tmp_path: Path) -> None:
    _, _, _, files = client.predict(**settings(), api_name="/measure")
    (run,) = read_runs(Path(files[0]))
    many = [replace(run, title=str(i)) for i in range(MOST + 2)]
    save_runs([*many, many[-1]], tmp_path / "many.json")
    given: Any = dict(path=handle_file(str(tmp_path / "many.json")), labels=[], axis=AXIS)
    boxes, results, _ = client.predict(**given, api_name="/load_runs")
    assert boxes["value"] == [one.title for one in reversed(many[2:])]
    assert f"The 3 oldest runs are not kept: the limit is {MOST}." in results  # and the measured one


def test_what_is_not_counted_and_what_the_bars_are_is_said(client: Client) -> None:
    _, _, results, _ = client.predict(**settings(), api_name="/measure")
    assert "FID ± what other seeds may do to it" in results
    assert UNCOUNTED not in results


def test_a_failed_measurement_says_so_where_its_progress_was(client: Client) -> None:
    job = client.submit(**(settings() | {"numbers": "5"}), api_name="/measure")
    with pytest.raises((AppError, ValueError), match="perfect square"):
        job.result()
    assert "Please change this: " in str(job.outputs()[-1][0])


def test_what_a_browser_stored_is_checked(client: Client) -> None:
    _, _, _, files = client.predict(**settings(), api_name="/measure")
    (run,) = read_runs(Path(files[0]))
    good = run.to_dict()
    assert checked([good]) == [run]
    odd_figures = good | {"lines": [{"speedup": float("nan")}]}
    hostile = [None, 7, "x", [], {}, {"title": "x"}, good | {"lines": []}, odd_figures, good | {"machine": 3}]
    assert checked([*hostile, good]) == checked([good, *hostile]) == [run]
    for anything in (None, 7, "x", {}, {"0": good}, [[good]], hostile):
        assert checked(anything) == []
    many = [good | {"title": str(i)} for i in range(50)]
    assert [run.title for run in checked(many)] == [str(i) for i in range(38, 50)]


def test_estimates_and_limits_before_measuring(client: Client) -> None:
    given = {name: value for name, value in settings().items() if name not in ("labels", "axis")}
    client.predict(**settings(), api_name="/measure")
    said, data = client.predict(*given.values(), api_name="/estimate_measure")
    assert "for 32 pictures" in said  # of three variants, and of the reference
    assert "Time: about" in said
    assert data["seconds"] > 0
    assert data == {"seconds": data["seconds"], "pictures": 32, "error": None}
    given["numbers"] = "x"
    said, data = client.predict(*given.values(), api_name="/estimate_measure")
    assert "numbers must be whole numbers" in said
    assert data["error"].startswith("numbers must be whole numbers with commas between them")
    assert data["seconds"] is data["pictures"] is None


def test_the_classes_of_a_model_are_data_too(client: Client) -> None:
    said, data = client.predict("cifar-sit", api_name="/describe_model")
    assert len(data["classes"]) == 10
    assert f"Prompt: the name of a class ({', '.join(data['classes'])})" in said
    assert f"guidance {data['guidance']:g}" in said


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"models": ["../../etc"]}, "not available here"),
        ({"numbers": "5"}, "perfect square"),
        ({"numbers": "1; import os"}, "whole numbers"),
        ({"samples": 10**6}, "greater than maximum value"),
        ({"extractor": "/etc/passwd"}, "not in the list of choices"),
        ({"against": "x"}, "not in the list of choices|Value: x"),
        ({"labels": ["someone else's"]}, "not in the list of choices"),
    ],
    ids=str,
)
def test_hostile_measurements_are_refused_in_words(client: Client, bad: dict[str, Any], says: str) -> None:
    with pytest.raises((AppError, ValueError), match=says) as caught:
        client.predict(**(settings() | bad), api_name="/measure")
    assert "Traceback" not in str(caught.value)


def test_a_file_of_something_else_is_refused_in_words(client: Client, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": "<script>"}))
    with pytest.raises((AppError, ValueError), match="not a file of results"):
        client.predict(path=handle_file(str(tmp_path / "x.json")), labels=[], axis=AXIS, api_name="/load_runs")
