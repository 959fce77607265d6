"""One training loop for every small model here: budget, progress line, checkpoints to resume from, a stop that saves.

Random numbers come from (seed, step), so a run that is stopped or killed and started again does what the
uninterrupted run does.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.files import write_whole

STOPPED = 75  # exit status of a run that was asked to stop: a temporary failure, try again

Losses = dict[str, Tensor]  # "loss" is minimised; the rest is printed beside it
LossOf = Callable[[nn.Module, int, torch.Generator], Losses]  # model, step, the step's random numbers


@dataclass(frozen=True)
class Budget:
    """How long to train: the first of these that is given."""

    steps: int | None = None  # optimizer steps
    samples: int | None = None
    minutes: float | None = None  # of training, all sittings together

    def __post_init__(self) -> None:
        given = [v for v in (self.steps, self.samples, self.minutes) if v is not None]
        if not given:
            raise ValueError("training needs a budget: steps, samples or minutes")
        if min(given) <= 0:
            raise ValueError(f"a budget must be positive, got {min(given)}")


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    raised: list[tuple[int, float]] = field(default_factory=list)  # (step, rate) where a larger budget raised the rate

    def done(self, budget: Budget) -> float:
        """0 at the start, 1 when the budget is spent."""
        if budget.steps is not None:
            return self.step / budget.steps
        if budget.samples is not None:
            return self.samples / budget.samples
        assert budget.minutes is not None
        return self.seconds / (60 * budget.minutes)


@dataclass(frozen=True)
class LoopConfig:
    budget: Budget
    batch: int  # samples per step
    seed: int = 0
    device: str = "cpu"
    clip: float | None = None  # largest norm of the gradient
    log_every: float = 20.0  # seconds
    save_every: float = 180.0  # seconds
    show_every: float = 900.0  # seconds between calls of `show`


@dataclass
class Trainee:
    """The model and the rest of a checkpoint's content."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[float], float]  # share of the budget done → learning rate
    ema: nn.Module | None = None  # averaged weights
    ema_decay: Callable[[float], float] = lambda done: 0.999
    progress: Progress = field(default_factory=Progress)

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        write_whole(path, partial(torch.save, {**state, "progress": vars(self.progress)}))

    def resume(self, path: Path, cfg: LoopConfig) -> None:
        """Resume from a checkpoint, if there is one."""
        if not path.exists():
            return
        state = torch.load(path, map_location=cfg.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        progress = {"samples": cfg.batch * state["progress"]["step"]} | state["progress"]
        self.progress = Progress(**progress)

    def update(self, loss: Tensor, cfg: LoopConfig) -> None:
        """One step of the optimizer and of the average."""
        done = self.progress.done(cfg.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(done)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        self.optimizer.step()
        if self.ema is not None:
            update_ema(self.ema, self.model, self.progress.step, self.ema_decay(done))
        self.progress.step += 1
        self.progress.samples += cfg.batch


Show = Callable[[nn.Module, Progress], None]  # averaged (or else trained) weights, progress


def train(
    name: str, trainee: Trainee, loss_of: LossOf, cfg: LoopConfig, checkpoint: Path, show: Show | None = None
) -> None:
    """Train in place until the budget is spent.

    SIGINT and SIGTERM let the step finish, save `checkpoint`, and leave with status `STOPPED`.
    """
    log = _Log(name, cfg, trainee)
    saved = shown = time.monotonic()
    progress = trainee.progress
    with stop_requests() as stop:
        while progress.done(cfg.budget) < 1 and not stop.is_set():
            start = time.monotonic()
            losses = loss_of(trainee.model, progress.step, step_rng(cfg.seed, progress.step))
            trainee.update(losses["loss"], cfg)
            progress.seconds += time.monotonic() - start
            log.add(losses)
            if time.monotonic() - saved > cfg.save_every:
                log.line()  # first, since it refuses a loss that is not finite
                trainee.save(checkpoint)
                saved = time.monotonic()
            if show is not None and time.monotonic() - shown > cfg.show_every:
                show(trainee.ema or trainee.model, progress)
                shown = time.monotonic()
        log.line()
        trainee.save(checkpoint)
    if progress.done(cfg.budget) < 1:
        print(f"{name}: stopped and saved at step {progress.step}; run the same command to resume", flush=True)
        raise SystemExit(STOPPED)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as it would have without this."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: FrameType | None) -> None:
        event.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def step_rng(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, independent of every other step."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)


def batch_indices(step: int, batch: int, count: int, seed: int) -> Tensor:
    """The pictures of one step: a fresh shuffle per epoch, known from the step alone (so a resume repeats it)."""
    places = range(step * batch, (step + 1) * batch)
    shuffles = {e: torch.randperm(count, generator=step_rng(seed, -1 - e)) for e in {p // count for p in places}}
    return torch.stack([shuffles[p // count][p % count] for p in places])


class _Log:
    """One line every `log_every` seconds: step, mean losses, learning rate, samples per second, time left."""

    def __init__(self, name: str, cfg: LoopConfig, trainee: Trainee):
        self.name, self.cfg, self.trainee = name, cfg, trainee
        self._mark()

    def _mark(self) -> None:
        progress = self.trainee.progress
        self.losses: list[Losses] = []
        self.time = time.monotonic()
        self.samples, self.seconds, self.done = progress.samples, progress.seconds, progress.done(self.cfg.budget)

    def add(self, losses: Losses) -> None:
        self.losses.append({k: v.detach() for k, v in losses.items()})
        if time.monotonic() - self.time > self.cfg.log_every:
            self.line()

    def line(self) -> None:
        if not self.losses:
            return
        progress = self.trainee.progress
        means = {k: torch.stack([one[k] for one in self.losses]).mean().item() for k in self.losses[0]}
        if not math.isfinite(means["loss"]):
            loss = means["loss"]
            raise ValueError(f"the loss is {loss} at step {progress.step}; start again with a lower learning rate")
        seconds, done = max(progress.seconds - self.seconds, 1e-9), progress.done(self.cfg.budget)
        left = max(1 - done, 0) * seconds / max(done - self.done, 1e-9)
        print(
            f"{self.name} step {progress.step} {' '.join(f'{k} {v:.4f}' for k, v in means.items())}"
            f" lr {self.trainee.optimizer.param_groups[0]['lr']:.1e}"
            f" {(progress.samples - self.samples) / seconds:.1f} img/s done {100 * done:.0f}% left {left / 60:.1f} min",
            flush=True,
        )
        self._mark()
