"""A page that others can reach: responses to raw requests, and how it shuts down."""

# ruff: noqa: E402, the page needs Gradio

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import web

web.need_gradio()

import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError

from diffattn.app.jobs import Models, Worker
from diffattn.app.page import Access, launch
from diffattn.app.page.files import Files
from diffattn.app.page.quality_charts import TIME

FAILS = (AppError, ValueError)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = web.save_models(tmp_path_factory.mktemp("shared") / "models")
    return web.tiny_worker(folder, jobs_of_address=3)


def join(address: str, session: str, **headers: str) -> httpx.Response:
    """Ask for a long job as a raw request; 0 is not its number, so it is looked up."""
    config = httpx.get(f"{address}config", headers=headers).json()
    number = next(d["id"] for d in config["dependencies"] if d["api_name"] == "generate")
    data = ["x", "one", "none", 400, None, None, None, 0, 4, "", *[None] * 3]
    body = {"data": data, "fn_index": number, "session_hash": session}
    return httpx.post(f"{address}gradio_api/queue/join", json=body, headers=headers)


def last_word(address: str, session: str) -> str:
    """Everything that the server says about the jobs of a session, until the first of them is over or refused."""
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events.iter_lines():
            if "process_completed" in line or "please" in line or "limit" in line:
                return line
    return ""


def test_made_up_sessions_have_one_limit_together(address: str, worker: Worker) -> None:
    sessions = [f"made-up-{i}" for i in range(12)]
    for session in sessions:
        assert join(address, session).status_code == 200
    web.wait_for(lambda: len(worker._stops._jobs) == 3)
    refused = [session for session in sessions[3:] if "limit" in last_word(address, session)]
    assert len(refused) >= 8  # whichever three came first
    for session in sessions:
        worker.stop(session)
    web.wait_for(lambda: not worker._stops._jobs)


def test_a_cookie_that_was_made_up_is_no_name(address: str, worker: Worker) -> None:
    given = httpx.get(address).cookies["diffattn-visitor"]
    name = given.partition(".")[0]
    for cookie, known in ((given, True), (f"{name}.{'0' * 64}", False), ("x", False), ('"', False), ("é", False)):
        session = f"cookie-{known}-{len(cookie)}"
        headers = {"cookie": f"diffattn-visitor={cookie}".encode()}
        assert join(address, session, **headers).status_code == 200  # type: ignore[arg-type]
        web.wait_for(lambda session=session: any(v.session == session for v in worker._stops._jobs.values()))
        (visitor,) = worker._stops._jobs.values()
        assert visitor.name == (name if known else None)
        assert visitor.owner == ("address", "127.0.0.1")
        worker.stop(session)
        web.wait_for(lambda: not worker._stops._jobs)


def test_a_forwarded_address_is_believed_from_a_named_proxy_alone(worker: Worker) -> None:
    for proxy, owner in ((None, "127.0.0.1"), ("127.0.0.1", "10.1.2.3")):
        page, address = launch(worker, Access(proxy=proxy), wait=False, warm_up=None)
        try:
            join(address, "forwarded", **{"x-forwarded-for": "10.1.2.3"})
            web.wait_for(lambda: worker._stops._jobs)
            (visitor,) = worker._stops._jobs.values()
            assert visitor.owner == ("address", owner)
        finally:
            worker.stop("forwarded")
            web.wait_for(lambda: not worker._stops._jobs)
            page.close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "a b", "10.0.0.1"])
def test_other_names_of_the_host_are_refused(address: str, host: str) -> None:
    for path in ("", "config", "gradio_api/info"):
        assert httpx.get(f"{address}{path}", headers={"host": host}).status_code == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://[x"]
)
def test_requests_from_other_sites_are_refused(address: str, origin: str) -> None:
    for content in ("application/json", "text/plain"):
        headers = {"origin": origin, "content-type": content}
        assert httpx.post(f"{address}gradio_api/queue/join", content="{}", headers=headers).status_code == 403
    own = address.rstrip("/")
    assert httpx.get(f"{address}config", headers={"origin": own}).status_code == 200


def test_a_page_on_all_addresses_is_called_by_address_or_by_its_name(worker: Worker) -> None:
    page, address = launch(
        worker, Access("0.0.0.0", auth=("me", "secret"), host_names=["Shown.example"]), wait=False, warm_up=None
    )
    try:
        found = [
            httpx.get(f"{address}login_check", headers={"host": host}).status_code != 400
            for host in ("10.0.0.1", "[::1]:80", "shown.example", "evil.example")
        ]
        assert found == [True, True, True, False]
    finally:
        page.close()


def test_large_requests_are_refused_before_they_are_read(address: str) -> None:
    big = b"x" * (10 * 2**20)
    for path in ("gradio_api/queue/join", "gradio_api/upload", "gradio_api/call/generate", "login"):
        large = big if path.endswith("upload") else big[: 5 * 2**20]
        begin = time.monotonic()
        try:
            status = httpx.post(f"{address}{path}", content=large, timeout=30).status_code
        except httpx.WriteError:  # it hung up
            status = 413
        assert status == 413, path
        assert time.monotonic() - begin < 20

    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 2**18

    with suppress(httpx.WriteError):
        assert httpx.post(f"{address}gradio_api/queue/join", content=pieces(), timeout=30).status_code == 413


@pytest.mark.parametrize("path", ["https://example.com/x.png", "http://127.0.0.1:9/x", "HTTP://example.com"])
def test_nothing_is_fetched_from_elsewhere_for_a_client(address: str, path: str) -> None:
    for way in ("file=", "file/", "proxy="):
        assert httpx.get(f"{address}gradio_api/{way}{path}").status_code == 404
    assert httpx.get(f"{address}gradio_api/file={path.replace(':', '%3A')}").status_code == 404
    said = answer(address, "generate", asked_with(path))
    assert ("not fetched from elsewhere" in said) == path.islower()
    assert "uploaded" in said


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "../../etc/passwd", "pyproject.toml"])
def test_a_file_that_was_not_uploaded_is_no_input(address: str, path: str) -> None:
    for endpoint, data in (
        ("generate", asked_with(path)),
        ("load_runs", [given_file(path), [], TIME]),
    ):
        assert "not uploaded" in answer(address, endpoint, data)


def test_videos_are_not_converted(address: str) -> None:
    video = {"video": ("x.mp4", b"x" * 1000)}
    for path in ("process_recording", "process_recording/"):
        assert httpx.post(f"{address}gradio_api/{path}", files=video).status_code == 404


def asked_with(recipe: str) -> list[Any]:
    return ["x", "one", "none", 2, None, None, None, 0, 1, "", given_file(recipe)]


def given_file(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def answer(address: str, endpoint: str, data: list[Any]) -> str:
    """What an endpoint says to raw data."""
    event = httpx.post(f"{address}gradio_api/call/{endpoint}", json={"data": data}).json()["event_id"]
    return httpx.get(f"{address}gradio_api/call/{endpoint}/{event}", timeout=60).text


NESTED = ["[" * n + "]" * n for n in (500, 5000, 10**6)]


@pytest.mark.parametrize("nested", NESTED, ids=lambda text: f"{len(text) // 2} deep")
def test_data_nested_deeply_harms_nobody(address: str, nested: str) -> None:
    for path in ("queue/join", "call/generate", "run/estimate"):
        body = f'{{"data": {nested}, "fn_index": 0, "session_hash": "deep"}}'
        headers = {"content-type": "application/json"}
        assert httpx.post(f"{address}gradio_api/{path}", content=body, headers=headers, timeout=30).status_code < 501
    assert httpx.get(f"{address}config").status_code == 200


@pytest.mark.parametrize("value", ["nonsense", ["nonsense"], None], ids=str)
def test_functions_that_are_no_endpoints_take_nonsense_without_a_word_in_the_log(
    address: str, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    server = logging.getLogger("uvicorn.error")
    server.addHandler(caplog.handler)
    for event in httpx.get(f"{address}config").json()["dependencies"]:
        body = {"data": [value] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "nonsense"}
        body |= {"event_data": {"index": -7, "value": value}}
        found = httpx.post(f"{address}gradio_api/run/predict", json=body)
        assert found.status_code in (200, 500)
        assert "Traceback" not in found.text
    for path in ("run/nonsense", "call/nonsense", "queue/join", "file=nonsense"):
        httpx.post(f"{address}gradio_api/{path}", json={"data": [], "session_hash": "nonsense"})
        httpx.get(f"{address}gradio_api/{path}", params={"session_hash": "other nonsense"})
    assert httpx.post(f"{address}gradio_api/call/nonsense", json={"data": []}).status_code == 404
    assert "a job failed" not in caplog.text
    unknown = {"data": ["nonsense"], "fn_index": 10**6, "session_hash": "nonsense"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=unknown).status_code == 500
    server.removeHandler(caplog.handler)
    assert "a request failed" in caplog.text
    assert "nonsense" not in caplog.text


def test_failed_logins_are_throttled(worker: Worker) -> None:
    page, address = launch(worker, Access(auth=("me", "secret")), wait=False, warm_up=None)
    try:
        right, wrong = ({"username": "me", "password": word} for word in ("secret", "wrong"))
        assert httpx.post(f"{address}login", data=right).status_code == 200
        found = [httpx.post(f"{address}login", data=wrong).status_code for _ in range(7)]
        assert found == [400] * 5 + [429] * 2
        assert httpx.post(f"{address}login", data=right).status_code == 429
    finally:
        page.close()


def test_under_a_password_the_limit_is_the_users(worker: Worker) -> None:
    page, address = launch(worker, Access(auth=("me", "secret")), wait=False, warm_up=None)
    try:
        client = Client(address, auth=("me", "secret"), verbose=False)
        job = client.submit("x", "one", "none", 400, api_name="/generate")
        web.wait_for(lambda: worker._stops._jobs)
        (visitor,) = worker._stops._jobs.values()
        worker.stop(visitor.session)
        assert visitor.owner == ("user", "me")
        job.cancel()
    finally:
        page.close()


def test_a_prompt_is_all_that_an_endpoint_needs(tmp_path: Path) -> None:
    side = max(Models().describe("emoji-sd").size or (0,))
    with web.served(web.tiny_worker(tmp_path, side=side, steps=2)) as address:
        client = Client(address, verbose=False)
        status, *_, records = client.predict(prompt="tent", api_name="/generate")
        assert "Done" in status
        assert [record["prompt"] for record in records] == ["tent"]
        described: Any = client.view_api(return_format="dict", print_info=False)
        for name, endpoint in described["named_endpoints"].items():
            for parameter in endpoint["parameters"]:
                assert not parameter["parameter_name"].startswith("param_"), name


@pytest.mark.slow
def test_a_prompt_is_all_that_a_comparison_needs(tmp_path: Path) -> None:
    side = max(Models().describe("emoji-sd").size or (0,))
    with web.served(web.tiny_worker(tmp_path, side=side, steps=2, images=1)) as address:
        *_, figures, _verdict = Client(address, verbose=False).predict(prompt="tent", api_name="/compare")
    names = [variant["acceleration"] for variant in figures["variants"]]
    assert names == ["none", "agent/balanced", "agent/fast"]


# The disk


def test_the_oldest_files_make_room_for_new_ones(tmp_path: Path) -> None:
    files = Files(tmp_path, seconds=3600, quota=2500)
    files.open()
    places = []
    for i in range(4):
        places.append(files.subfolder())
        places[-1].mkdir()
        (places[-1] / "x.png").write_bytes(b"x" * 1000)
        os.utime(places[-1], (time.time(), time.time() - 100 + i))
    files.make_room()
    assert [place.exists() for place in places] == [False, False, True, True]
    files.close()
    assert not files.folder.exists()


def test_leftovers_of_a_killed_page_are_swept_and_those_of_a_running_one_are_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from diffattn.app.page.files import Files\n"
        "files = Files(Path(sys.argv[1]), 3600); files.open(); place = files.subfolder(); place.mkdir()\n"
        "(place / 'x.png').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    (left,) = tmp_path.rglob("x.png")
    first = Files(tmp_path, 3600)
    first.open()
    assert left.exists()
    child.kill()
    child.wait()
    second = Files(tmp_path, 3600)
    second.open()
    assert not left.exists()
    assert first.folder.exists()
    first.close()
    second.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_page_soon_with_a_visitor_there_and_removes_pictures(tmp_path: Path, how: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "diffattn", "app", "--port", str(port), "--device", "cpu", "--no-hub"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        web.wait_for(lambda: answers(address))
        client = Client(address, verbose=False, download_files=False)
        client.predict(prompt="tent", steps=2, api_name="/generate")
        assert list(tmp_path.rglob("*.png"))
        job = client.submit(prompt="tent", steps=100, num_images=8, api_name="/generate")
        web.wait_for(lambda: any("step " in str(out) for out in job.outputs()))
        with httpx.stream("GET", f"{address}gradio_api/heartbeat/abc", timeout=60):  # as an open page does
            server.send_signal(how)
            server.wait(timeout=20)
        assert not list(tmp_path.rglob("*.png"))
    finally:
        server.kill()


def answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False
