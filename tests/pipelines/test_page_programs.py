"""The programs that fill and measure the page, on few steps."""

# ruff: noqa: E402, the page needs Gradio

import json
import os
import sys
from pathlib import Path

import pytest
from support import web

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

web.need_gradio()

import check_clients
import check_estimates
import precompute_first_view
import served_page

from diffattn.app.jobs.first_view import FirstView
from diffattn.app.jobs.stored_steps import read_steps
from diffattn.drawing.loading import embedded_models

pytestmark = [
    pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning"),
    pytest.mark.skipif("cifar-sit" not in embedded_models(), reason="the embedded model is not installed"),
]


@pytest.mark.parametrize("only_steps", [False, True])
def test_the_steps_of_a_first_view_show_a_switch(tmp_path: Path, only_steps: bool) -> None:
    precompute_first_view.main(
        "cifar-sit", prompt="horse", acceleration="mediator/balanced", pictures=3, steps=8, device="cpu",
        only_steps=only_steps, out=tmp_path,
    )  # fmt: skip
    trace = read_steps(tmp_path)
    assert trace is not None
    assert trace.switches
    assert trace.title == "cifar-sit, horse, mediator/balanced, 8 steps"
    assert (FirstView.read(tmp_path) is None) == only_steps


def test_every_estimate_has_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side = web.Worker(device="cpu").models.describe("cifar-sit").size
    assert side is not None
    check_estimates.main("cifar-sit", prompt="1", steps=2, runs=2, device="cpu", out=tmp_path / "x.json")
    jobs = json.loads((tmp_path / "x.json").read_text())["jobs"]
    assert [job["what"] for job in jobs] == [f"{side[0]} {what}" for what in (
        "none", "none", "automatic", "automatic", "automatic, 4 steps", "compared"
    )]  # fmt: skip
    assert jobs[0]["estimate"] is None  # the two steps of the warm-up promise nothing
    for job in jobs[1:]:
        assert job["error"] == pytest.approx(job["estimate"] / job["seconds"] - 1)
    assert "1 without one" in capsys.readouterr().out


def test_who_got_the_picture_of_another_or_of_another_seed_is_not_right() -> None:
    jobs = [(1, 1, "a"), (2, 1, "b"), (3, 3, "c"), (4, 4, "c")]
    assert check_clients.right([check_clients.Job(*job, seconds=1) for job in jobs]) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_clients_at_once_get_their_own_pictures_and_the_page_ends(capsys: pytest.CaptureFixture[str]) -> None:
    check_clients.main("cifar-sit", prompt="1", clients=3, jobs=2, steps=2)
    said = capsys.readouterr().out
    assert "6 of 6 jobs of 3 clients right" in said
    assert "files left: 0" in said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_that_a_process_holds_is_read() -> None:
    before = served_page.resident(os.getpid())
    held = bytearray(os.urandom(64 * 2**20))
    assert served_page.resident(os.getpid()) - before >= 60
    del held
