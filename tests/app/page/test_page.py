"""The page's endpoints, through Gradio's own client."""

# ruff: noqa: E402, the page needs Gradio

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import web

web.need_gradio()

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffattn.app.jobs import Limits, Worker
from diffattn.app.page import Access, build, launch
from diffattn.app.page.files import Files
from diffattn.drawing.request import record_of

FAILS = (AppError, ValueError)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return web.tiny_worker(web.save_models(tmp_path_factory.mktemp("web") / "models"))


@pytest.fixture
def client(address: str) -> Client:
    return Client(address, verbose=False)


def draw(client: Client, **changes: Any) -> Any:
    return client.predict(**(settings() | changes), api_name="/generate")


def settings() -> Any:
    return dict(prompt="a cat", model="one", acceleration="none", steps=2, guidance=None, width=None, height=None,
                seed=0, num_images=1, negative_prompt="", recipe=None)  # fmt: skip


def compare_settings() -> Any:
    found = settings()
    del found["acceleration"]
    return found | {"accelerations": ["agent/fast", "agent/balanced"], "width": 64, "height": 64}


@pytest.mark.parametrize("most", [(1, 1, 8), (7, 2, 9), (100, 8, 256)])
def test_the_page_begins_within_its_limits(worker: Worker, tmp_path: Path, most: tuple[int, int, int]) -> None:
    limits = dict(zip(("steps", "images", "samples"), most, strict=True))
    page = build(Worker(worker.models, Limits(**limits), "cpu"), Files(tmp_path, 60))
    found: list[Any] = [block for block in page.blocks.values() if type(block).__name__ == "Slider"]
    of_label = {"Steps": limits["steps"], "Pictures": limits["images"], "N: pictures of each": limits["samples"]}
    assert sorted(slider.label for slider in found) == ["N: pictures of each", *["Pictures"] * 2, *["Steps"] * 3]
    for slider in found:
        limit = of_label[slider.label]
        assert slider.minimum <= slider.value <= limit
        assert slider.minimum < slider.maximum
        assert slider.interactive == (slider.minimum < limit)


def test_the_endpoints_have_names_and_named_arguments(client: Client) -> None:
    described: Any = client.view_api(return_format="dict", print_info=False)
    found = described["named_endpoints"]
    assert set(found) == {
        "/generate", "/stop", "/compare", "/show_pair", "/time_steps", "/describe_model", "/estimate",
        "/measure", "/show_runs", "/load_runs", "/estimate_measure",
    }  # fmt: skip
    assert [name for name, endpoint in found.items() if not endpoint["description"]] == []
    assert [p["parameter_name"] for p in found["/generate"]["parameters"]] == list(settings())
    assert all(p["parameter_has_default"] for p in found["/generate"]["parameters"][1:])
    assert all(p["parameter_has_default"] for p in found["/compare"]["parameters"][1:])
    for name in ("/measure", "/estimate_measure"):
        assert all(p["parameter_has_default"] for p in found[name]["parameters"])


def test_what_is_answered_in_html_is_also_answered_as_data_or_files(address: str) -> None:
    for name, endpoint in httpx.get(f"{address}gradio_api/info").json()["named_endpoints"].items():
        kinds = {value["component"] for value in endpoint["returns"]}
        assert "Html" not in kinds or kinds & {"Json", "File"}, name


def test_generate_gives_png_files_with_recipes_and_the_code(client: Client) -> None:
    stage, pictures, files, code, records = draw(
        client, num_images=2, seed=7, acceleration="agent/fast", width=64, height=64
    )
    assert "2 of 2 pictures" in stage
    assert len(pictures) == 2
    assert [record_of(Path(file))["seed"] for file in files] == [record["seed"] for record in records] == [7, 8]
    assert all(record["seconds"] > 0 for record in records)
    assert "manual_seed(7)" in code
    assert f"diffattn.patch(pipe, 'agent', preset='fast', decisions={records[0]['decisions']})" in code


def test_a_recipe_goes_before_the_acceleration_and_is_compared(client: Client, tmp_path: Path) -> None:
    recipe = {"method": "agent", "options": {"num_agents": 9, "min_tokens": 0}, "schedule": {"0.5": {}, "0.0": "exact"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    given = handle_file(str(tmp_path / "recipe.json"))
    _, _, files, code, _ = draw(client, recipe=given, acceleration="none")
    assert record_of(Path(files[0]))["recipe"] == recipe
    assert "recipe={'method': 'agent'" in code
    asked = compare_settings() | {"accelerations": [], "recipe": given}
    _, _, pair, figures, *_ = client.predict(**asked, api_name="/compare")
    assert [record_of(Path(file))["recipe"] for file in pair] == [None, recipe]
    assert "<td>recipe</td>" in figures
    (tmp_path / "recipe.json").write_text(json.dumps({"method": "agent", "code": "import os"}))
    with pytest.raises(FAILS, match="unknown recipe key code"):
        draw(client, recipe=handle_file(str(tmp_path / "recipe.json")))


def test_time_steps_are_those_of_the_same_visitor(client: Client, address: str) -> None:
    draw(client, acceleration="agent/pooled", steps=5, width=64, height=64)
    chart, data = client.predict(api_name="/time_steps")
    assert "<svg" in chart
    assert data["switches"] == [next(i for i, n in enumerate(data["numbers"]) if n is None)]
    chart, data = Client(address, verbose=False).predict(api_name="/time_steps")
    assert "Draw something under Generate or Compare first" in chart
    assert data is None


def test_time_steps_of_every_variant_of_a_comparison(client: Client) -> None:
    client.predict(**compare_settings(), api_name="/compare")
    charts, found = zip(
        *(client.predict(f"Compare: {name}", api_name="/time_steps") for name in ("none", "agent/fast")), strict=True
    )
    assert "every step ran exact attention" in charts[0]
    assert "every step ran exact attention" not in charts[1]
    assert [data["title"] for data in found] == ["none", "agent/fast"]
    assert client.predict("Generate", api_name="/time_steps")[1] is None
    with pytest.raises(FAILS, match=r"no such run.*agent/pooled.*Compare: none, Compare: agent/fast"):
        client.predict("Compare: agent/pooled", api_name="/time_steps")
    with pytest.raises(FAILS, match=r"no such run.*agent/fast"):
        client.predict("agent/fast", api_name="/time_steps")


def test_compare_and_its_pairs(client: Client) -> None:
    _, _, pair, figures, report, data, verdict = client.predict(**compare_settings(), api_name="/compare")
    assert [record_of(Path(file))["method"] for file in pair] == ["none", "agent"]
    assert "<td>Balanced</td>" in figures
    assert "why exact" in report
    assert [v["acceleration"] for v in data["variants"]] == ["none", "agent/fast", "agent/balanced"]
    assert all(v["speedup"] is None for v in data["variants"])  # one picture is no measurement
    assert "×" not in verdict
    assert "draw at least 3" in figures
    other = client.predict("Balanced", api_name="/show_pair")
    assert record_of(Path(other[1]))["preset"] == "balanced"
    assert "Peak memory is measured on CUDA devices only" in figures
    assert "GFLOPs are counted up to" not in figures


def test_a_failed_job_says_so_where_its_progress_was(client: Client) -> None:
    for changes, name in ((settings(), "/generate"), (compare_settings(), "/compare")):
        job = client.submit(**(changes | {"width": 33}), api_name=name)
        with pytest.raises(FAILS, match="multiple of 8"):
            job.result()
        stage = str(job.outputs()[-1][0])
        assert "Please change this: " in stage
        assert "multiple of 8" in stage


def test_the_page_answers_while_a_job_runs(client: Client, address: str) -> None:
    running = client.submit(**(settings() | {"steps": 400, "num_images": 4}), api_name="/generate")
    web.wait_for(lambda: any("step " in str(out) for out in running.outputs()))
    other = Client(address, verbose=False)
    assert "32×32" in other.predict("one", api_name="/describe_model")[0]
    assert "Time:" in other.predict("one", 2, None, None, 1, api_name="/estimate")[0]
    assert not running.done()
    client.predict(api_name="/stop")
    web.wait_for(running.done)


def test_about_a_model_and_its_time(client: Client) -> None:
    said, about = client.predict("one", api_name="/describe_model")
    assert "one: a StableDiffusionPipeline, 32×32 pixels" in said
    size = {"width": 32, "height": 32}
    assert about == {"name": "one", "what": "a StableDiffusionPipeline", **size, "guidance": None, "classes": []}
    draw(client)
    said, data = client.predict("one", 2, None, None, 1, api_name="/estimate")
    assert "Time: about" in said
    assert data["seconds"] > 0
    assert data == {"seconds": data["seconds"], "pictures": 1, "error": None}
    said, twice = client.predict("one", 2, None, None, 2, api_name="/estimate")
    assert twice["pictures"] == 2
    said, unknown = client.predict("group/two", 2, None, None, 3, api_name="/estimate")
    assert "known after the first run" in said
    assert unknown == {"seconds": None, "pictures": 3, "error": None}


def test_the_estimate_of_what_is_refused_is_its_error(client: Client) -> None:
    said, data = client.predict("one", 2, 10**6, None, 1, api_name="/estimate")
    assert data == {
        "seconds": None, "pictures": None, "error": "width must be a whole number from 8 to 64, got 1000000",
    }  # fmt: skip
    assert data["error"] in said
    said, data = client.predict("<b>/x&y", api_name="/estimate")
    assert "model '<b>/x&y' is not available here" in data["error"]
    assert "model &#x27;&lt;b&gt;/x&amp;y&#x27; is not available here" in said


def test_downloads_are_deleted_when_they_are_old_and_when_the_page_ends(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def pictures() -> list[Path]:
        return sorted(tmp_path.rglob("*.png"))

    with web.served(worker) as address:
        client = Client(address, verbose=False, download_files=False)
        draw(client, num_images=2)
        old = pictures()
        (folder,) = {file.parent for file in old}  # of a job: a new picture keeps those before it
        draw(client, seed=1)
        assert len(pictures()) == 3
        os.utime(folder, (0, 0))
        client.predict(**compare_settings(), api_name="/compare")
        assert not set(old) & set(pictures())
        assert len(pictures()) == 4  # the second, and of the comparison those of each variant
    web.wait_for(lambda: not pictures())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"model": "../../etc"}, "not available here"),
        ({"model": "/etc"}, "not available here"),
        ({"width": 10**9}, "width must be"),
        ({"width": 33}, "multiple of 8"),
        ({"guidance": 1e9}, "guidance must be"),
        ({"guidance": "nan"}, "guidance must be a number from 0 to 30, got nan"),
        ({"steps": 10**6}, "greater than maximum value 400"),
        ({"num_images": 99}, "greater than maximum value 4"),
        ({"acceleration": "__class__"}, "not in the list of choices"),
        ({"prompt": "x" * 101}, "at most 100 characters"),
        ({"seed": -1}, "less than minimum value 0"),
        ({"seed": 2**70}, "seed must be a whole number"),
    ],
    ids=str,
)
def test_hostile_inputs_are_refused_in_words(client: Client, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(FAILS, match=says) as caught:
        draw(client, **bad)
    assert "Traceback" not in str(caught.value)
    assert "diffattn/" not in str(caught.value)


def test_nothing_that_a_visitor_sends_gets_into_the_log(
    client: Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    word, other = "unheard-of-word", compare_settings()
    for name, given in (
        ("/generate", settings() | {"acceleration": word}), ("/generate", settings() | {"seed": word}),
        ("/generate", settings() | {"model": word}), ("/generate", settings() | {"num_images": word}),
        ("/generate", settings() | {"prompt": {"a": word}, "width": 33}),
        ("/compare", other | {"accelerations": [word]}),
        ("/describe_model", {"model": word}), ("/measure", {"models": [word]}), ("/measure", {"extractor": word}),
        ("/estimate", {"model": "one", "steps": word}), ("/show_runs", {"labels": [word]}),
        ("/show_pair", {"name": word}), ("/time_steps", {"run": [word]}),
    ):  # fmt: skip
        values: Any = given
        with suppress(*FAILS):
            client.predict(**values, api_name=name)
    assert word not in caplog.text
    told = capfd.readouterr()
    assert word not in told.out
    assert word not in told.err


def test_a_component_that_refuses_its_value_says_so_in_a_toast(client: Client) -> None:
    with pytest.raises(FAILS, match=r"Expected a `float"):
        draw(client, seed="seven")


def test_files_of_the_server_are_not_served(address: str) -> None:
    for path in ("/etc/passwd", str(Path(__file__)), "pyproject.toml", "../../etc/passwd"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_eight_clients_at_once_each_get_their_own(address: str) -> None:
    def visit(seed: int) -> tuple[int, list[str]]:
        files = draw(Client(address, verbose=False), seed=100 * seed)[2]
        return record_of(Path(files[0]))["seed"], files

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, range(8)))
    assert [seed for seed, _ in found] == [100 * seed for seed in range(8)]
    assert len({file for _, files in found for file in files}) == 8


def test_stop_ends_a_running_job_of_its_visitor_alone(client: Client, address: str) -> None:
    job = client.submit(**(settings() | {"steps": 400, "num_images": 4}), api_name="/generate")
    web.wait_for(lambda: any("step " in str(out) for out in job.outputs()))
    said, data = Client(address, verbose=False).predict(api_name="/stop")
    assert "Nothing is running" in said
    assert data == {"stopped": False}
    begin = time.monotonic()
    said, data = client.predict(api_name="/stop")
    assert "Stopped" in said
    assert data == {"stopped": True}
    web.wait_for(job.done)
    assert time.monotonic() - begin < 30
    assert "Stopped" in str(job.outputs()[-1])


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_waiting_job_says_its_place_and_can_leave_the_line(client: Client, address: str, how: str) -> None:
    running = client.submit(**(settings() | {"steps": 400, "num_images": 4}), api_name="/generate")
    web.wait_for(lambda: any("step " in str(out) for out in running.outputs()))
    other = Client(address, verbose=False)
    waiting = other.submit(**settings(), api_name="/generate")
    web.wait_for(lambda: any("Waiting: 1 job runs before yours" in str(out) for out in waiting.outputs()))
    if how == "stop":
        assert "Stopped" in other.predict(api_name="/stop")[0]
        web.wait_for(waiting.done)
        assert "Stopped" in str(waiting.outputs()[-1])
    else:
        assert waiting.cancel()
    assert not running.done()
    client.predict(api_name="/stop")
    web.wait_for(running.done)
    assert "Done" in draw(client)[0]
    assert not any("step " in str(out) for out in waiting.outputs())


@pytest.mark.parametrize(
    "open_to_others", [{"share": True}, {"host": "0.0.0.0"}, {"host": "0.0.0.0", "auth": ("", "")}]
)
def test_a_page_open_to_others_needs_a_password(open_to_others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--auth"):
        Access(**open_to_others)


def test_with_a_password_nothing_is_served_without_it(worker: Worker) -> None:
    page, address = launch(worker, Access(auth=("me", "secret")), wait=False, warm_up=None)
    try:
        assert httpx.get(f"{address}gradio_api/info").status_code == 401
        inside = Client(address, auth=("me", "secret"), verbose=False)
        assert "32×32" in inside.predict("one", api_name="/describe_model")[0]
    finally:
        page.close()
