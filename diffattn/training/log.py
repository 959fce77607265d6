"""The log of a run: a line, and figures for the trackers, every `every` steps."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.training.objective import LossBins


@dataclass
class TrainProgress:
    """The progress of a run."""

    step: int = 0  # optimizer steps, skipped ones included
    skipped: int = 0  # because the loss or its gradient was not finite
    seconds: float = 0.0  # of training, over all interrupted runs


@dataclass(frozen=True)
class StepDone:
    """The figures of a step for the log."""

    loss: Tensor  # mean over this process's samples, on the device
    norm: Tensor  # of the gradient over all processes
    lr: float


class StepLog:
    """Collects losses on the device and only reads them when a line is due.

    Logging never stops a run: a tracker that fails (e.g. TensorBoard on a full disk) is reported once and disabled from
    then on.

    Args:
        accelerator: whose trackers and processes are used.
        every: steps between lines.
        steps: of the whole run.
        batch: samples of a step, over all processes.
        say: prints a line, on the main process.
    """

    def __init__(self, accelerator: Any, every: int, steps: int, batch: int, say: Callable[[str], None]) -> None:
        self.accelerator = accelerator
        self.every, self.steps, self.batch = every, steps, batch
        self._say = say
        self._done: list[StepDone] = []

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            with suppress(OSError):  # standard output may be a file on a full disk, or a pipe that was closed
                self._say(line)

    def begin(self, progress: TrainProgress) -> None:
        """Start, or resume, from this progress."""
        self._mark = (progress.step, progress.seconds)

    @contextmanager
    def timed(self, progress: TrainProgress) -> Iterator[None]:
        """Count the time of a step as training."""
        start = time.monotonic()
        yield
        progress.seconds += time.monotonic() - start

    def add(self, done: StepDone, progress: TrainProgress, bins: LossBins) -> None:
        """Record a completed step in `progress`. Every process must call it."""
        self._done.append(done)
        if progress.step % self.every == 0:
            self.flush(progress, bins)

    def flush(self, progress: TrainProgress, bins: LossBins) -> None:
        """Print and track what has been collected. Every process must call it."""
        if not self._done:
            return
        figures = self._figures(progress, bins)
        self._done = []
        self._mark = (progress.step, progress.seconds)
        self.track(figures, progress.step)
        left = (self.steps - progress.step) * figures["seconds_per_step"]
        skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
        self.say(
            f"step {progress.step}/{self.steps}  loss {figures['loss']:.4f}  "
            f"gradient {figures['gradient_norm']:.2f}  lr {figures['lr']:.1e}  "
            f"{figures['samples_per_second']:.1f} img/s  {_duration(left)} left{skipped}"
        )

    def track(self, figures: Mapping[str, float], step: int) -> None:
        """Pass figures to the trackers."""
        self._each_tracker(lambda tracker: tracker.log(dict(figures), step=step))

    def finish(self) -> None:
        """Close the trackers."""
        self._each_tracker(lambda tracker: tracker.finish())

    def _each_tracker(self, action: Callable[[Any], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                action(tracker)
            except Exception as error:  # a tracker may raise any error of its library
                self.accelerator.trackers.remove(tracker)
                self.say(f"{tracker.name} failed and is disabled from here on: {error}")

    def _figures(self, progress: TrainProgress, bins: LossBins) -> dict[str, float]:
        loss = self.accelerator.reduce(torch.stack([done.loss for done in self._done]).mean(), "mean")
        sums = self.accelerator.reduce(bins.sums, "sum")
        steps = progress.step - self._mark[0]
        seconds = max(progress.seconds - self._mark[1], 1e-9)
        return {
            "loss": float(loss),
            "gradient_norm": float(torch.stack([done.norm for done in self._done]).float().mean()),
            "lr": self._done[-1].lr,
            "samples_per_second": steps * self.batch / seconds,
            "seconds_per_step": seconds / max(steps, 1),
            "skipped_steps": float(progress.skipped),
            **bins.read(sums),
        }


def _duration(seconds: float) -> str:
    """ "1:02:03" """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
