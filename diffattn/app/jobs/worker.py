"""Runs one job at a time on one model at a time."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline
from huggingface_hub.constants import HF_HUB_CACHE

from diffattn.app.jobs.choices import Models, acceleration_of
from diffattn.app.jobs.compare import Comparison, compare
from diffattn.app.jobs.discretion import quiet_libraries
from diffattn.app.jobs.estimates import Estimates
from diffattn.app.jobs.events import latest
from diffattn.app.jobs.limits import Limits
from diffattn.app.jobs.memory import give_back
from diffattn.app.jobs.naming import naming
from diffattn.app.jobs.preview import Preview
from diffattn.app.jobs.quality_run import Measurement, QualityRun
from diffattn.app.jobs.run_trace import RunTrace
from diffattn.app.jobs.snippet import snippet
from diffattn.app.jobs.speed_quality import (
    check_measurable,
    extractor_for,
    measure,
    stored_runs,
)
from diffattn.app.jobs.stops import Stop, Stopped, Stops
from diffattn.app.jobs.stored_steps import read_steps
from diffattn.app.jobs.suited import check_suited
from diffattn.app.jobs.turns import Turns
from diffattn.app.jobs.visitor import Visitor
from diffattn.app.jobs.watch import Audience, JobProgress, Watch
from diffattn.drawing.classes import class_ids, draws_classes
from diffattn.drawing.draw import generate, prepare
from diffattn.drawing.loading import load_pipeline
from diffattn.drawing.prompt_length import unread_part
from diffattn.drawing.request import Picture, Request
from diffattn.files import stem_of
from diffattn.machine import choose_device, choose_dtype, fastest_dtype
from diffattn.patching.patch import Patch
from diffattn.patching.report import Report

log = logging.getLogger("diffattn.app.jobs")

REFRESH_SECONDS = 0.1  # at least between progress events, so that a page can keep up with a fast model


@dataclass(frozen=True)
class Drawn:
    """All pictures of a job so far."""

    request: Request  # with its size, guidance and method filled in
    pictures: tuple[Picture, ...]
    report: Report | None
    trace: RunTrace  # of the last picture
    code: str  # Python that draws the first picture again
    unread: str = ""  # the end of the prompt, beyond what the model's text encoder takes


Emit = Callable[[Any], None]


class Worker:
    """Loads one model at a time and runs one job at a time, for all visitors; independent of the page.

    Args:
        models: the available ones.
        limits: of one job.
        device, dtype: as `choose_device` and `choose_dtype` take them; dtype "auto" is the device's `fastest_dtype`.
    """

    def __init__(
        self, models: Models | None = None, limits: Limits | None = None, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self.models, self.limits = models or Models(), limits or Limits()
        self.device = choose_device(device)
        self.dtype = fastest_dtype(self.device) if dtype == "auto" else choose_dtype(dtype, self.device)
        self._turns = Turns()
        limits = self.limits
        self._stops = Stops(limits.jobs, limits.jobs_of_address, limits.jobs_in_all)
        self.estimates = Estimates(self.models, self.limits)
        self._loaded: tuple[str, Any, Preview | None] | None = None

    def generate(self, session: Hashable | Visitor, request: Request) -> Iterator[JobProgress | Drawn]:
        """Draw; yields progress after every step, and all pictures so far after every picture.

        Raises:
            Stopped: by `stop`.
            ValueError, TypeError: an invalid model, class or size, see `prepare`; more jobs, or a longer one, than
                `Limits` allow.
        """
        check_suited(self.models, request.model, acceleration_of(request))
        return self._stream(session, lambda emit, stop: self._generate(request, emit, stop))

    def compare(
        self, session: Hashable | Visitor, request: Request, names: Sequence[str]
    ) -> Iterator[JobProgress | Comparison]:
        """Draw the same pictures unpatched and with every acceleration; raises like `generate`."""
        self.limits.check_work(request.num_images * (1 + len(names)), request.steps)
        check_suited(self.models, request.model, names)

        def work(emit: Emit, stop: Stop) -> None:
            pipe, _ = self._model(request.model, emit)

            def watch(ready: Request, patch: Patch | None, done: int, pictures: int | None, what: str) -> Watch:
                return self._watch(pipe, ready, patch, self._audience(stop, emit), done, pictures, what)

            found = compare(pipe, request, names, watch)
            emit(replace(found, unread=_unread(pipe, request.prompt)))

        return self._stream(session, work)

    def measure(self, session: Hashable | Visitor, asked: Measurement) -> Iterator[JobProgress | QualityRun]:
        """Measure speed and quality; a `QualityRun` per completed model. Raises like `generate` and `measure`.

        Every model is first checked to be able to draw what is requested.
        """
        for name in asked.models:
            extractor_for(name, asked.extractor, self.models)  # before anything is loaded or measured
            check_suited(self.models, name, asked.accelerations)

        def work(emit: Emit, stop: Stop) -> None:
            for name in reversed(asked.models):  # the first one last: it stays loaded
                stop.check()
                self._check_measurable(name, asked, emit)
            for name in asked.models:
                emit(self._measure(name, asked, emit, stop))

        return self._stream(session, work)

    def stop(self, session: Hashable, tab: str | None = None) -> bool:
        """Stop the jobs of a session, or of one tab of its page: the running one within one step, waiting ones
        immediately. → whether any were"""
        found = self._stops.stop(session, tab)
        self._turns.wake()
        return found

    def ended(self, session: Hashable, timeout: float, tab: str | None = None) -> bool:
        """Wait for the jobs of a session, or of one tab, to end; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._stops.has_jobs(session, tab):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self, timeout: float = 30.0) -> bool:
        """Stop all jobs and wait until none runs. Call this before the program ends: if Python exits while PyTorch
        computes in another thread, it aborts or hangs.

        Args:
            timeout: seconds; a step, or a model that is being loaded, is waited for.

        Returns:
            Whether all jobs have ended.
        """
        self._stops.stop_all()
        self._turns.wake()
        return self._turns.wait_for_none(timeout)

    def stored_runs(self) -> list[QualityRun]:
        """The measurements stored beside the models; a damaged file is skipped, with a line in the log."""
        found: list[QualityRun] = []
        for name in self.models.names():
            try:
                found += stored_runs(self.models.place(name))
            except ValueError as error:
                log.warning("%s: %s", name, error)
        return found

    def stored_steps(self) -> RunTrace | None:
        """The steps of a run that are stored beside a model; one in which the number of mediators or agents changes is
        preferred. A damaged file is skipped, with a line in the log."""
        found: list[RunTrace] = []
        for name in self.models.names():
            try:
                trace = read_steps(self.models.place(name))
            except ValueError as error:
                log.warning("%s: %s", name, error)
                continue
            found += [trace] if trace else []
        return next((trace for trace in found if trace.switches), found[0] if found else None)

    def warm_up(self, name: str) -> None:
        """Load a model and run two steps, so that the first job starts immediately; they are not used for estimates."""
        nobody = object()  # no visitor can name it to stop it
        try:
            request = self.limits.request(name, "0", steps=min(2, self.limits.steps), acceleration="none")
            for _ in self._stream(nobody, lambda emit, stop: self._generate(request, emit, stop, learn=False)):
                pass
        except ValueError as error:  # for example a model whose pictures are larger than allowed
            log.warning("%s is not warmed up: %s", name, error)
        except Stopped:
            pass  # the worker is closed

    def _generate(self, request: Request, emit: Emit, stop: Stop, learn: bool = True) -> None:
        pipe, preview = self._model(request.model, emit)
        ready, patch = prepare(pipe, request)
        try:
            audience = Audience(stop, emit, preview, self.estimates.learn if learn else None)
            with self._watch(pipe, ready, patch, audience, 0, ready.num_images) as watch:
                pictures: list[Picture] = []
                for picture in generate(pipe, ready):
                    pictures.append(picture)
                    emit(self._drawn(pipe, ready, pictures, patch, watch.trace))
                    watch.drawn(picture)
                    watch.begin_picture()
        finally:
            if patch:
                patch.remove()

    def _drawn(
        self, pipe: Any, request: Request, pictures: Sequence[Picture], patch: Patch | None, trace: RunTrace
    ) -> Drawn:
        local = self.models.is_local(request.model)
        ids = class_ids(pipe, [request.prompt]) if isinstance(pipe, DiTPipeline) else None
        same = replace(request, decisions=pictures[0].record.get("decisions"))  # as here, whatever is faster elsewhere
        code = snippet(same, dit_labels=ids, local=local, dtype=self.dtype, device=self.device)
        report = patch.report() if patch else None
        return Drawn(request, tuple(pictures), report, trace, code, _unread(pipe, request.prompt))

    def _check_measurable(self, name: str, asked: Measurement, emit: Emit) -> None:
        """Load a model, and raise if it cannot draw everything that is requested."""
        pipe, _ = self._model(name, emit)
        for ready in check_measurable(pipe, name, asked, self.models):
            self._check_size(ready)

    def _measure(self, name: str, asked: Measurement, emit: Emit, stop: Stop) -> QualityRun:
        """Measure one model; no reference to it is kept, so that it is freed before the next is loaded."""
        pipe, _ = self._model(name, emit)

        def watch(ready: Request, patch: Patch | None, done: int, pictures: int | None, what: str) -> Watch:
            audience = self._audience(stop, emit)
            return self._watch(pipe, ready, patch, audience, done, pictures, f"{ready.model}: {what}")

        return measure(pipe, name, asked, self.models, watch)

    def _watch(self, pipe: Any, ready: Request, patch: Patch | None, audience: Audience, *rest: Any) -> Watch:
        """A `Watch` for a request from `prepare`, which filled in the size; `rest` as in `Watch`."""
        self._check_size(ready)
        return Watch(pipe, ready, patch, audience, *rest)

    def _check_size(self, ready: Request) -> None:
        assert ready.width is not None
        assert ready.height is not None
        self.limits.check_size(ready.width, ready.height)

    def _audience(self, stop: Stop, emit: Emit) -> Audience:
        return Audience(stop, emit, learn=self.estimates.learn)

    def _model(self, name: str, emit: Emit) -> tuple[Any, Preview | None]:
        """Load the model of this name, replacing any other."""
        source = self.models.source(name)
        if self._loaded is None or self._loaded[0] != source:
            emit(JobProgress(0, 0, 0, 0, None, what=f"loading {name}"))
            self._unload()
            on_hub = self.models.place(name) is None
            unsaid = quiet_libraries() if on_hub else nullcontext()  # only there the name is the visitor's
            with unsaid, naming(source, name), naming(HF_HUB_CACHE, "the cache"):
                pipe: Any = load_pipeline(source, self.dtype).to(self.device)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = source, pipe, Preview.of(pipe)
            self.estimates.loaded(name, pipe)
        return self._loaded[1], self._loaded[2]

    def _unload(self) -> None:
        self._loaded = None
        give_back(self.device, collect=True)

    def _stream(self, session: Hashable | Visitor, work: Callable[[Emit, Stop], None]) -> Iterator[Any]:
        """Yield what `work`, run in its own thread, emits.

        Closing the iterator stops the work within one step without waiting for it, since the caller may have others to
        serve; the next job waits for its turn.
        """
        found: queue.Queue[Any] = queue.Queue()
        stop, done = self._stops.add(session), object()

        def waiting(ahead: int) -> None:
            found.put(JobProgress(0, 0, 0, 0, None, ahead=ahead))

        def run() -> None:
            last: Any = done
            try:
                with self._turns.turn(stop, waiting, session):
                    stop.start_clock(self.limits.seconds)
                    try:
                        work(found.put, stop)
                    finally:
                        give_back(self.device)
            except BaseException as error:  # re-raised in the calling thread
                last = error
            finally:
                self._stops.discard(session, stop)
            found.put(last)

        thread = threading.Thread(target=run, name="diffattn-job", daemon=True)
        try:
            thread.start()
            sent = -REFRESH_SECONDS
            while (event := latest(found, sent + REFRESH_SECONDS)) is not done:
                if isinstance(event, BaseException):
                    raise event
                sent = time.monotonic()
                yield event
            thread.join()  # it has nothing left to do, and a program that ends now would cut it off
        finally:
            stop.set()
            self._turns.wake()


def _unread(pipe: Any, prompt: str) -> str:
    """The end of a prompt, beyond what the model's text encoder takes."""
    return "" if draws_classes(pipe) else unread_part(pipe, prompt)


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write PNG files with their records, and create the folder. → their paths"""
    paths = []
    for picture in pictures:
        way = "-".join(filter(None, (picture.record["method"], picture.record["preset"])))
        paths.append(folder / f"{stem_of(str(picture.record['prompt']))}-{way}-{picture.seed}.png")
        picture.save(paths[-1])
    return paths
