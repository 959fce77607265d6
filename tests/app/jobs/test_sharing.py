"""One worker for many visitors: what a client can forge gives it neither more jobs nor earlier turns."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import web

from diffattn.app.jobs import Drawn, TooLong, Visitor
from diffattn.app.jobs.stops import Stop, Stops
from diffattn.app.jobs.turns import Turns


def test_made_up_sessions_and_fresh_names_give_no_more_jobs() -> None:
    stops = Stops(2, of_owner=3, in_all=50)
    jobs = [stops.add(Visitor(f"made up {i}", None, "10.0.0.1")) for i in range(3)]
    for name in (None, "fresh", "fresher"):
        with pytest.raises(ValueError, match="3 jobs of your user name or address"):
            stops.add(Visitor("another", name, "10.0.0.1"))
    other = Visitor("s", "browser", "10.0.0.2")
    stops.add(other)
    stops.add(Visitor("another tab", "browser", "10.0.0.2"))
    with pytest.raises(ValueError, match="you already have 2 jobs"):
        stops.add(Visitor("a third tab", "browser", "10.0.0.2"))
    stops.discard(other, jobs[0])
    stops.add(Visitor("another", None, "10.0.0.1"))


def test_the_queue_has_an_end_and_says_so_politely() -> None:
    stops = Stops(2, in_all=5)
    for i in range(5):
        stops.add(Visitor(i, i, i))
    with pytest.raises(ValueError, match="the queue is full, with 5 jobs: please try again in a few minutes"):
        stops.add(Visitor(6, 6, 6))


def test_stop_stops_one_page_of_a_browser() -> None:
    stops = Stops(4)
    one, two = (stops.add(Visitor(page, "browser", "address")) for page in ("one", "two"))
    assert stops.stop("one")
    assert (one.is_set(), two.is_set()) == (True, False)


def test_stop_stops_one_tab_of_a_page() -> None:
    stops = Stops(4)
    tabs = {tab: stops.add(Visitor("page", "browser", "address", tab)) for tab in ("generate", "compare", "quality")}
    assert stops.stop("page", "compare")
    assert [name for name, stop in tabs.items() if stop.is_set()] == ["compare"]
    assert not stops.stop("another page", "generate")
    assert stops.has_jobs("page", "generate")
    assert not stops.has_jobs("page", "steps")
    assert stops.stop("page")  # whatever runs
    assert all(stop.is_set() for stop in tabs.values())


@pytest.mark.parametrize("made_up", [False, True])
def test_many_jobs_of_one_do_not_hold_up_the_one_of_another(made_up: bool) -> None:
    turns, order, go_on = Turns(), list[str](), threading.Event()

    def job(session: str, owner: str) -> None:
        with turns.turn(Stop(), lambda ahead: None, Visitor(session, None, owner)):
            order.append(owner)
            go_on.wait(20)

    threads = []
    for i, owner in enumerate(["many"] * 6 + ["one", "two"]):
        threads.append(threading.Thread(target=job, args=(str(i) if made_up else owner, owner)))
        threads[-1].start()
        end = time.monotonic() + 20
        while len(turns) <= i and time.monotonic() < end:
            time.sleep(0.005)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert order == ["many", "one", "two", *["many"] * 5]


@pytest.mark.slow
def test_a_job_has_a_limited_time_and_keeps_what_it_drew(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models"), seconds=6, steps=800, images=4)
    list(worker.generate("a", web.ask(worker)))
    events: list[Any] = []
    with pytest.raises(TooLong, match=r"the job was ended after .* minutes, the limit here; use fewer steps"):
        events.extend(worker.generate("a", web.ask(worker, steps=800, num_images=4)))
    assert isinstance(list(worker.generate("a", web.ask(worker)))[-1], Drawn)
