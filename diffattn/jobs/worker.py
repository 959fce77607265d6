"""One job at a time on one model at a time."""

import gc
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.devices import choose_device, choose_dtype
from diffattn.generation import Picture, Request, generate, prepare
from diffattn.jobs.choices import Models
from diffattn.jobs.compare import Comparison, compare
from diffattn.jobs.limits import Limits
from diffattn.jobs.preview import Preview
from diffattn.jobs.run_trace import RunTrace
from diffattn.jobs.watch import Progress, Stopped, Watch
from diffattn.loading import load_pipeline
from diffattn.report import Report
from diffattn.sampling import SiTPipeline

PIXELS = 256 * 256


@dataclass(frozen=True)
class Drawn:
    """All pictures of a job so far."""

    request: Request  # with its size, guidance and method filled in
    pictures: tuple[Picture, ...]
    report: Report | None
    trace: RunTrace  # of the last picture
    draws_classes: bool


Emit = Callable[[Any], None]


class Worker:
    """Loads one model at a time and runs one job at a time, whoever asks; knows nothing of the page.

    Args:
        models: those that may be asked for.
        limits: of one job.
        device, dtype: as `choose_device` and `choose_dtype` take them.
    """

    def __init__(
        self, models: Models | None = None, limits: Limits | None = None, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self.models, self.limits = models or Models(), limits or Limits()
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._turn = threading.Lock()
        self._stops: dict[str, set[threading.Event]] = {}
        self._pace: dict[str, float] = {}  # model -> seconds of one step of 256x256 pixels
        self._loaded: tuple[str, Any, Preview] | None = None

    def generate(self, session: str, request: Request) -> Iterator[Progress | Drawn]:
        """Draw; progress after every step, and what is there after every picture.

        Raises:
            Stopped: by `stop`.
            ValueError, TypeError: a model, class or size that cannot be; as `prepare`.
        """
        return self._stream(session, lambda emit, stop: self._generate(request, emit, stop))

    def compare(self, session: str, request: Request, names: Sequence[str]) -> Iterator[Progress | Comparison]:
        """Draw the same pictures unpatched and with every acceleration; raises as `generate`."""

        def work(emit: Emit, stop: threading.Event) -> None:
            with self._model(request.model, emit) as (pipe, _):

                def watch(ready: Request, patch: Any, done: int, pictures: int, what: str) -> Watch:
                    return Watch(pipe, ready, patch, stop, emit, None, done, pictures, what)

                emit(compare(pipe, request, names, watch))

        return self._stream(session, work)

    def stop(self, session: str) -> bool:
        """Stop the running job of a session within one step; whether there was one."""
        found = list(self._stops.get(session, ()))
        for event in found:
            event.set()
        return bool(found)

    def seconds_for(self, request: Request, pictures: int | None = None) -> float | None:
        """Estimate for a job, from the pace of the model's latest run; None before there was one."""
        pace = self._pace.get(request.model)
        size = self.models.describe(request.model).size or (512, 512)
        pixels = (request.width or size[0]) * (request.height or size[1])
        return None if pace is None else pace * pixels / PIXELS * request.steps * (pictures or request.num_images)

    def warm_up(self, name: str) -> None:
        """Load a model and run two steps, so that the first job begins at once and its time is known."""
        for _ in self.generate("", self.limits.request(name, "0", steps=2, acceleration="none")):
            pass

    def _generate(self, request: Request, emit: Emit, stop: threading.Event) -> None:
        with self._model(request.model, emit) as (pipe, preview):
            ready, patch = prepare(pipe, request)
            try:
                with Watch(pipe, ready, patch, stop, emit, preview) as watch:
                    pictures: list[Picture] = []
                    for picture in generate(pipe, ready):
                        pictures.append(picture)
                        report = patch.report() if patch else None
                        emit(Drawn(ready, tuple(pictures), report, watch.trace, isinstance(pipe, SiTPipeline)))
                        watch.done += 1
                        self._learn_pace(ready, watch.trace)
                        watch.begin_picture()
            finally:
                if patch:
                    patch.remove()

    def _learn_pace(self, request: Request, trace: RunTrace) -> None:
        assert request.width is not None
        assert request.height is not None
        later = sorted(trace.seconds[1:] or trace.seconds)
        self._pace[request.model] = later[len(later) // 2] * PIXELS / (request.width * request.height)

    @contextmanager
    def _model(self, name: str, emit: Emit) -> Iterator[tuple[Any, Preview]]:
        """The model of a name, loaded if another was; no_grad as pipelines have it."""
        source = self.models.source(name)
        if self._loaded is None or self._loaded[0] != source:
            emit(Progress(0, 0, 0, 0, None, what=f"loading {name}"))
            self._unload()
            pipe: Any = load_pipeline(source, self.dtype).to(self.device)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = source, pipe, Preview(pipe)
        yield self._loaded[1], self._loaded[2]

    def _unload(self) -> None:
        self._loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stream(self, session: str, work: Callable[[Emit, threading.Event], None]) -> Iterator[Any]:
        """What `work` emits, from a thread of its own; closing the iterator stops the work and waits for it."""
        found: queue.Queue[Any] = queue.Queue()
        stop, done = threading.Event(), object()
        self._stops.setdefault(session, set()).add(stop)

        def run() -> None:
            try:
                with self._turn:
                    if stop.is_set():
                        raise Stopped
                    work(found.put, stop)
                found.put(done)
            except BaseException as error:  # raised again where the work was asked for
                found.put(error)

        thread = threading.Thread(target=run, name="diffattn-job", daemon=True)
        try:
            thread.start()
            while (event := _latest(found)) is not done:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()
            thread.join()
            self._stops[session].discard(stop)
            if not self._stops[session]:
                del self._stops[session]


def _latest(found: "queue.Queue[Any]") -> Any:
    """The next event; progress that is out of date is passed over, unless it alone has a preview."""
    event = found.get()
    while isinstance(event, Progress) and found.queue and isinstance(found.queue[0], Progress):
        later = found.get()
        event = later if later.preview is not None or event.preview is None else event
        if event is not later:
            return event
    return event


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """PNG files with their recipes, in a new folder of a random name below `folder`."""
    place = folder / secrets.token_hex(16)
    paths = []
    for picture in pictures:
        stem = re.sub(r"\W+", "-", str(picture.recipe["prompt"])).strip("-")[:60] or "empty"
        way = "-".join(filter(None, (picture.recipe["method"], picture.recipe["preset"])))
        paths.append(place / f"{stem}-{way}-{picture.seed}.png")
        picture.save(paths[-1])
    return paths
