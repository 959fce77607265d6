"""What a run says: a line, and figures for the trackers, every so many steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffattn.training.loop import Progress, Trainer


class StepLog:
    """Collects losses on the device and reads them when a line is due.

    Args:
        accelerator: whose trackers and processes are used.
        every: steps between lines.
        say: prints a line, on the main process.
    """

    def __init__(self, accelerator: Any, every: int, say: Callable[[str], None]) -> None:
        self.accelerator = accelerator
        self.every = every
        self._say = say
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self._say(line)

    def begin(self, progress: "Progress") -> None:
        """The run begins, or goes on, from here."""
        self._mark = (progress.step, progress.seconds)

    @contextmanager
    def timed(self, progress: "Progress") -> Iterator[None]:
        """The time of a step counts as training."""
        start = time.monotonic()
        yield
        progress.seconds += time.monotonic() - start

    def add(self, trainer: "Trainer", loss: Tensor, norm: Tensor) -> None:
        """A step is done."""
        self._losses.append(loss)
        self._norms.append(norm)
        if trainer.progress.step % self.every == 0:
            self.flush(trainer)

    def flush(self, trainer: "Trainer") -> None:
        """Say and track what has been collected. Every process must call it."""
        if not self._losses:
            return
        figures = self._figures(trainer)
        self._losses, self._norms = [], []
        self._mark = (trainer.progress.step, trainer.progress.seconds)
        self.accelerator.log(figures, step=trainer.progress.step)
        left = (trainer.config.run.steps - trainer.progress.step) * figures["seconds_per_step"]
        skipped = f", {trainer.progress.skipped} steps skipped" if trainer.progress.skipped else ""
        self.say(
            f"step {trainer.progress.step}/{trainer.config.run.steps}  loss {figures['loss']:.4f}  "
            f"gradient {figures['gradient_norm']:.2f}  lr {figures['lr']:.1e}  "
            f"{figures['samples_per_second']:.1f} img/s  {_duration(left)} left{skipped}"
        )

    def _figures(self, trainer: "Trainer") -> dict[str, float]:
        loss = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean")
        bins = self.accelerator.reduce(trainer.bins.sums, "sum")
        steps = trainer.progress.step - self._mark[0]
        seconds = max(trainer.progress.seconds - self._mark[1], 1e-9)
        return {
            "loss": float(loss),
            "gradient_norm": float(torch.stack(self._norms).float().mean()),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "samples_per_second": steps * trainer.config.optim.batch / seconds,
            "seconds_per_step": seconds / max(steps, 1),
            "skipped_steps": float(trainer.progress.skipped),
            **trainer.bins.read(bins),
        }


def _duration(seconds: float) -> str:
    """ "1:02:03" """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
