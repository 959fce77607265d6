"""Follows a run from outside, with hooks on the denoiser that stop it, time it and make previews."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from PIL import Image
from torch import Tensor

from diffattn.app.jobs.discretion import quiet_libraries, without_words
from diffattn.app.jobs.preview import Preview, clean_estimate
from diffattn.app.jobs.run_trace import Recorder, RunTrace
from diffattn.app.jobs.stops import Stop
from diffattn.architectures.denoisers import denoiser_of
from diffattn.drawing.request import Picture, Request
from diffattn.patching.patch import Patch

log = logging.getLogger("diffattn.app.jobs")

EVENT_SECONDS = 0.3  # minimum time between two events, and thus between two previews


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job."""

    step: int  # calls of the denoiser of this picture
    steps: int
    picture: int  # pictures done before
    pictures: int
    seconds_left: float | None  # of the job
    preview: Image.Image | None = None
    what: str = ""
    ahead: int = 0  # jobs before this one, which has not started


Learn = Callable[[Request, float, Sequence[float]], None]


@dataclass(frozen=True)
class Audience:
    """Callbacks that follow the runs of a job, and the event that stops them."""

    stop: Stop  # ends the run
    emit: Callable[[JobProgress], None]  # takes the events
    preview: Preview | None = None  # makes the previews; None: no previews
    learn: Learn | None = None  # called with every whole picture's request, its seconds and those of its calls


class Watch:
    """Follows every call of the pipeline's denoiser within its `with` block; leaves no hook behind.

    An event is sent after the first and last call of a picture, and between them every `EVENT_SECONDS`; the device is
    only synchronised for events.

    Args:
        pipe: the pipeline; only it is called within the block.
        request, patch: of the pictures, as `prepare` returned them.
        audience: receives the events, and may stop the run.
        done: pictures of the job before this run.
        pictures: of the whole job; None: this run is a warm-up, without an estimate of the time left.
        what: description of the run in its events.

    Raises:
        Stopped, TooLong: out of the denoiser, before its next call, see `Stop.check`.
        ValueError, TypeError: raised by the pipeline; logged with the stack, since it may be a bug.
    """

    def __init__(
        self,
        pipe: Any,
        request: Request,
        patch: Patch | None,
        audience: Audience,
        done: int = 0,
        pictures: int | None = None,
        what: str = "",
    ) -> None:
        self.pipe, self.request, self.patch = pipe, request, patch
        self.audience = audience
        self.done, self.pictures, self.what = done, pictures, what
        self.inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # phase -> arguments of its first call
        self._denoiser: Any = denoiser_of(pipe)
        self._handles: list[Any] = []
        self._quiet = quiet_libraries()
        self._begin = time.perf_counter()
        self._last_event = 0.0
        self._calls = 0
        self.begin_picture()

    def begin_picture(self) -> None:
        """Begin another picture, to which the next call belongs."""
        self._last = time.perf_counter()
        self.recorder = Recorder(self.what, self.patch)
        self._state: Tensor | None = None

    def drawn(self, picture: Picture) -> None:
        """Note that the current picture is complete."""
        self.done += 1
        if self.audience.learn is not None:
            self.audience.learn(self.request, picture.seconds, self.recorder.trace.seconds)

    @property
    def trace(self) -> RunTrace:
        """The trace of the current picture, or of the last one."""
        return self.recorder.finished()

    def __enter__(self) -> Self:
        self._quiet.__enter__()
        self._handles = [
            self._denoiser.register_forward_pre_hook(self._before),
            self._denoiser.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._quiet.__exit__(None, None, None)
        if isinstance(error, ValueError | TypeError):
            log.error("drawing failed\n%s", without_words(error))

    def _before(self, module: Any, args: tuple[Any, ...]) -> None:
        self.audience.stop.check()

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        now = time.perf_counter()
        self._calls += 1
        x, t = noisy_input(args, kwargs)
        self.recorder.record(self._change(x), now - self._last)
        self._last = now
        call = self.patch.last_call() if self.patch else {"phase": 0}
        if call and isinstance(call["phase"], int):
            self.inputs.setdefault(call["phase"], (args, kwargs))
        step, steps = self._num_calls(), self._num_steps()
        if step in (1, steps) or now - self._last_event > EVENT_SECONDS:
            self._tell(step, steps, x, t, output, now)

    def _tell(self, step: int, steps: int, x: Tensor, t: Tensor, output: Any, now: float) -> None:
        sketch = None
        if self.audience.preview is not None:
            found = output[0] if isinstance(output, tuple) else output.sample
            sketch = self.audience.preview(clean_estimate(self.pipe, x, t, found, self.request.guidance or 1))
        left = self._seconds_left(step, steps, now)
        self.audience.emit(JobProgress(step, steps, self.done, self.pictures or 1, left, sketch, self.what))
        self._last_event = time.perf_counter()

    def _seconds_left(self, step: int, steps: int, now: float) -> float | None:
        if self.pictures is None or self._calls < 2:
            return None
        return (now - self._begin) / self._calls * ((self.pictures - self.done) * steps - step)

    def _num_calls(self) -> int:
        return len(self.recorder.trace.seconds)

    def _num_steps(self) -> int:
        return max(len(self.pipe.scheduler.timesteps), self._num_calls())

    def _change(self, x: Tensor) -> Tensor | None:
        """mean |x_k - x_{k-1}| of the conditional half, left on its device, since reading it would synchronise."""
        before, self._state = self._state, x[-1].detach().float().clone()
        return None if before is None else (self._state - before).abs().mean()


def noisy_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The latents and the time step of a denoiser call; pipelines pass them by position or by name."""
    x = args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states") if name in kwargs)
    return x, args[1] if len(args) > 1 else kwargs["timestep"]
