"""`diffattn app` and `app.py`: what they refuse, and that they serve the page."""

# ruff: noqa: E402, the page needs Gradio

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import web

web.need_gradio()

import httpx
from typer.testing import CliRunner

from diffattn.app.page import WARM_UP
from diffattn.cli import app

ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


def refusal(*words: object) -> str:
    """What the command says when it refuses."""
    done = CliRunner().invoke(app, ["app", *map(str, words)])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


@contextmanager
def running(*words: object) -> Iterator[str]:
    """The address that a program prints, which is then ended as by Ctrl+C."""
    with subprocess.Popen(
        [sys.executable, "-u", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background of a shell it is ignored
    ) as program:  # fmt: skip
        try:
            assert program.stdout is not None
            found = next(match for line in program.stdout if (match := ADDRESS.search(line)))
            yield found[0]
        finally:
            program.send_signal(signal.SIGINT)
            try:
                program.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                program.kill()
                raise
    assert program.returncode in (0, 130)  # not by a crash: it may have been in the middle of its warm-up


@pytest.mark.parametrize("open_to_others", ["--share", "--listen"])
def test_a_page_open_to_others_needs_a_password(open_to_others: str) -> None:
    assert "a page that others can reach needs --auth NAME:PASSWORD" in refusal(open_to_others)


@pytest.mark.parametrize("auth", ["", "name", "name:", ":password"])
def test_a_name_and_a_password_are_both_needed(auth: str) -> None:
    assert "--auth must be NAME:PASSWORD, with neither empty" in refusal("--listen", "--auth", auth)


def test_the_folder_of_models_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "nowhere"):
        assert f"'{place}' is not a folder of models" in refusal("--models-dir", place)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", 0), ("--port", 65536), ("--max-side", 0), ("--max-steps", 0), ("--max-images", -1)],
)
def test_numbers_out_of_range_are_refused(option: str, value: int) -> None:
    said = refusal(option, value)
    assert option in said
    assert str(value) in said


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot serve the page on port {port}" in refusal("--port", port)
    assert WARM_UP not in [thread.name for thread in threading.enumerate()]


def test_the_command_serves_the_models_of_a_folder_to_those_with_the_password(tmp_path: Path) -> None:
    web.save_sits(tmp_path, "sit")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("app", "--models-dir", tmp_path, "--no-hub", "--auth", "me:secret:word", "--port", port)
    with running("-m", "diffattn", *words) as address:
        assert address.endswith(f":{port}")
        assert httpx.get(f"{address}/config").status_code == 401
        with httpx.Client(base_url=address) as visitor:
            assert visitor.post("/login", data={"username": "me", "password": "secret"}).status_code == 400
            assert visitor.post("/login", data={"username": "me", "password": "secret:word"}).status_code == 200
            assert '"sit"' in visitor.get("/config").text


def test_app_py_serves_the_page() -> None:
    with running("app.py") as address:
        page = httpx.get(address).text
        assert "<title>diffattn</title>" in page or '"title":"diffattn"' in page
