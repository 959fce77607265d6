"""Stop ends a job within one step whatever it draws with, and only one job runs at a time."""

import inspect
import sys
import threading
from dataclasses import replace
from itertools import groupby
from typing import Any, Self

import numpy as np
import pytest
from support import tiny, tiny_transformers, web

from diffattn.app.jobs import Drawn, JobProgress, Limits, Stopped, Worker
from diffattn.app.jobs.stops import Stops


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = web.save_models(tmp_path_factory.mktemp("stop") / "models", side=64)
    web.save_sits(folder, "sit")
    tiny_transformers.pixart_pipeline(tiny.vae(), sample_size=32).save_pretrained(folder / "pixart")
    return web.tiny_worker(folder)


class SecondStep:
    """Within its `with` block the second call of a denoiser does not end before `go_on` is set."""

    def __init__(self, pipe: Any) -> None:
        self.calls: list[int | None] = []  # the threads that made them
        self.under_way, self.go_on = threading.Event(), threading.Event()
        denoiser: Any = getattr(pipe, "unet", None) or pipe.transformer
        self._handle = denoiser.register_forward_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.calls.append(threading.current_thread().ident)
        if len(self.calls) == 2:
            self.under_way.set()
            assert self.go_on.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._handle.remove()


def test_stop_ends_a_run_within_one_step_and_leaves_the_model_clean(worker: Worker) -> None:
    list(worker.generate("a", web.ask(worker)))
    before, steps = web.traces_of_patching(web.loaded(worker)), []

    def run() -> None:
        event: Any
        for event in worker.generate("a", web.ask(worker, steps=400, acceleration="agent/fast")):
            steps.append(event.step)
            if event.step and len(steps) < 4:
                assert not worker.stop("somebody else")
                assert worker.stop("a")

    with pytest.raises(Stopped):
        run()
    assert max(steps) < 100
    assert web.traces_of_patching(web.loaded(worker)) == before
    assert not worker.stop("a")


@pytest.mark.parametrize(
    ("model", "acceleration"), [("one", "agent/fast"), ("sit", "none"), ("sit", "mediator/fast"), ("pixart", "none")]
)
def test_stop_during_a_step_lets_no_other_begin(worker: Worker, model: str, acceleration: str) -> None:
    list(worker.generate("a", web.ask(worker, model=model, prompt="1")))
    pipe = web.loaded(worker)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    takes_callback = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    assert takes_callback == (model != "pixart")
    with SecondStep(pipe) as second_step:
        events = worker.generate("a", web.ask(worker, model=model, prompt="1", steps=400, acceleration=acceleration))
        assert wait_for_a_step(events).preview is not None
        assert second_step.under_way.wait(20)
        assert worker.stop("a")
        second_step.go_on.set()
        with pytest.raises(Stopped):
            list(events)
    assert len(second_step.calls) == 2
    assert not denoiser._forward_pre_hooks
    assert not denoiser._forward_hooks


def test_a_session_has_ended_when_the_step_under_way_has(worker: Worker) -> None:
    request = web.ask(worker, steps=6)
    list(worker.generate("a", request))

    def run() -> None:
        with pytest.raises(Stopped):
            list(worker.generate("a", request))

    assert worker.ended("a", 0)
    with SecondStep(web.loaded(worker)) as second:
        thread = threading.Thread(target=run)
        thread.start()
        assert second.under_way.wait(20)
        assert worker.stop("a")
        assert not worker.ended("a", 0.1)
        second.go_on.set()
        assert worker.ended("a", 20)
        thread.join(20)


def test_an_iterator_that_is_closed_stops_its_job(worker: Worker) -> None:
    list(worker.generate("a", web.ask(worker)))
    with SecondStep(web.loaded(worker)) as second_step:
        events: Any = worker.generate("a", web.ask(worker, steps=400))
        wait_for_a_step(events)
        assert second_step.under_way.wait(20)
        events.close()
        second_step.go_on.set()
        jobs = [thread for thread in threading.enumerate() if thread.name == "diffattn-job"]
        for job in jobs:
            job.join(timeout=60)
        assert not any(job.is_alive() for job in jobs)
    assert len(second_step.calls) == 2
    assert web.traces_of_patching(web.loaded(worker))[:2] == (0, 0)
    assert not worker.stop("a")


def test_closing_does_not_wait_for_a_step_and_the_next_job_still_runs_alone(worker: Worker) -> None:
    alone: Any = list(worker.generate("a", web.ask(worker)))[-1]
    with SecondStep(web.loaded(worker)) as second_step:
        first: Any = worker.generate("a", web.ask(worker, steps=400, acceleration="agent/fast"))
        wait_for_a_step(first)
        assert second_step.under_way.wait(20)
        first.close()
        assert not second_step.go_on.is_set()
        second: Any = worker.generate("b", web.ask(worker))
        assert next(second).ahead == 1  # the step of the first still runs
        second_step.go_on.set()
        drawn = list(second)[-1]
    assert len(second_step.calls) == 4
    calls = second_step.calls
    assert calls[0] == calls[1] != calls[2] == calls[3]
    assert np.array_equal(np.asarray(drawn.pictures[0].image), np.asarray(alone.pictures[0].image))
    assert web.traces_of_patching(web.loaded(worker))[:2] == (0, 0)


def test_a_closed_worker_has_stopped_every_job_and_waited_for_the_step(worker: Worker) -> None:
    worker = Worker(worker.models, worker.limits, "cpu")  # for this test alone: it has no job any more
    list(worker.generate("a", web.ask(worker)))
    with SecondStep(web.loaded(worker)) as second_step:
        first = worker.generate("a", web.ask(worker, steps=400))
        wait_for_a_step(first)
        assert second_step.under_way.wait(20)
        second: Any = worker.generate("b", web.ask(worker))
        assert next(second).ahead == 1
        assert not worker.close(timeout=0.05)  # the step is under way
        second_step.go_on.set()
        assert worker.close(timeout=20)
    assert len(second_step.calls) == 2
    for events in (first, second):
        with pytest.raises(Stopped):
            list(events)
    with pytest.raises(Stopped):
        list(worker.generate("c", web.ask(worker)))


def test_nobody_can_stop_the_warm_up(worker: Worker) -> None:
    list(worker.generate("a", web.ask(worker)))
    with SecondStep(web.loaded(worker)) as second_step:
        warm_up = threading.Thread(target=worker.warm_up, args=("one",))
        warm_up.start()
        assert second_step.under_way.wait(20)
        assert not any(worker.stop(session) for session in ("", "None", "a"))
        second_step.go_on.set()
        warm_up.join()
    assert len(second_step.calls) == 2


def test_closing_the_worker_ends_the_warm_up_without_a_word(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(worker.models, worker.limits, "cpu")
    list(worker.generate("a", web.ask(worker)))
    raised: list[BaseException] = []

    def warm_up() -> None:
        try:
            worker.warm_up("one")
        except BaseException as error:
            raised.append(error)

    with SecondStep(web.loaded(worker)) as second_step:
        second_step.calls.append(None)  # the first call waits already
        thread = threading.Thread(target=warm_up)
        thread.start()
        assert second_step.under_way.wait(20)
        assert not worker.close(timeout=0.05)
        second_step.go_on.set()
        assert worker.close(timeout=20)
        thread.join(20)
    assert len(second_step.calls) == 2  # no step more
    assert not raised
    assert not caplog.records


def test_a_warm_up_that_cannot_be_says_why(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    small = Worker(worker.models, Limits(side=32), "cpu")
    small.warm_up("one")
    assert "one is not warmed up: width 64 is above the limit" in caplog.text


def test_a_session_has_a_few_jobs_at_a_time(worker: Worker) -> None:
    worker = Worker(worker.models, replace(worker.limits, jobs=2), "cpu")
    list(worker.generate("a", web.ask(worker)))
    with SecondStep(web.loaded(worker)) as second_step:
        jobs: list[Any] = [worker.generate(name, web.ask(worker)) for name in "aab"]
        running, waiting, other = jobs
        wait_for_a_step(running)
        assert next(waiting).ahead == 1
        with pytest.raises(ValueError, match=r"you already have 2 jobs running or queued \(limit 2\)"):
            next(worker.generate("a", web.ask(worker)))
        assert next(other).ahead == 1  # before the second of "a", who has had a turn
        second_step.go_on.set()
        for events in (*jobs, worker.generate("a", web.ask(worker))):
            assert isinstance(list(events)[-1], Drawn)


def test_no_stop_is_lost_among_many_threads() -> None:
    stops, errors, interval = Stops(1000), list[str](), sys.getswitchinterval()

    def come_and_go() -> None:
        for _ in range(300):
            stop = stops.add("a")
            if not stops.stop("a") or not stop.is_set():
                errors.append("a stop was lost")
            stops.discard("a", stop)

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert not stops.stop("a")


def test_a_job_that_comes_after_all_were_stopped_is_stopped_too() -> None:
    stops = Stops(2)
    before = stops.add("a")
    stops.stop_all()
    assert before.is_set()
    assert stops.add("a").is_set()
    assert stops.add("b").is_set()


def test_jobs_of_several_visitors_run_one_after_the_other(worker: Worker) -> None:
    asked = web.ask(worker, steps=4, acceleration="none")
    drawn: Any = list(worker.generate("x", asked))[-1]
    alone = np.asarray(drawn.pictures[0].image)
    pictures: dict[str, Any] = {}
    calls: list[threading.Thread] = []  # of the denoiser: the jobs that made them

    def visit(name: str) -> None:
        for event in worker.generate(name, asked):
            if isinstance(event, Drawn):
                pictures[name] = np.asarray(event.pictures[0].image)

    visitors = [threading.Thread(target=visit, args=(str(i),)) for i in range(3)]
    with web.loaded(worker).unet.register_forward_hook(lambda *_: calls.append(threading.current_thread())):
        for thread in visitors:
            thread.start()
        for thread in visitors:
            thread.join()
    assert [len(list(own)) for _, own in groupby(calls)] == [4, 4, 4]
    assert len(pictures) == 3
    assert all(np.array_equal(picture, alone) for picture in pictures.values())


def test_jobs_wait_in_line_and_can_leave_it(worker: Worker) -> None:
    running: Any = worker.generate("one", web.ask(worker, steps=400, num_images=4))
    wait_for_a_step(running)
    ahead: dict[str, list[int]] = {"two": [], "three": []}

    def wait(name: str) -> None:
        try:
            for event in worker.generate(name, web.ask(worker)):
                if isinstance(event, JobProgress) and event.ahead:
                    ahead[name].append(event.ahead)
        except Stopped:
            ahead[name].append(-1)

    threads = []
    for i, name in enumerate(ahead, start=1):
        threads.append(threading.Thread(target=wait, args=(name,)))
        threads[-1].start()
        while not ahead[name]:
            next(running)
        assert ahead[name] == [i]
    assert worker.stop("two")  # it leaves while the first runs on
    threads[0].join()
    assert set(ahead["two"]) == {1, -1}
    assert wait_for_a_step(running).picture < 4
    running.close()
    threads[1].join()
    assert sorted(set(ahead["three"])) == [1, 2]
    assert len(worker._turns) == 0


def wait_for_a_step(events: Any) -> JobProgress:
    return next(event for event in events if isinstance(event, JobProgress) and event.step)
