"""The training loop. All its randomness depends on (seed, step) alone, so a resumed run repeats the uninterrupted one.

Shapes: B samples of one process in one step.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from diffattn.data.classes import check_classes
from diffattn.models import DiT
from diffattn.training import checkpoints, state
from diffattn.training.batches import Batches
from diffattn.training.config import OptimConfig, TrainConfig, differing_fields
from diffattn.training.distill import Distillation
from diffattn.training.finite import NonFiniteLoss, check_finite
from diffattn.training.log import StepDone, StepLog, TrainProgress
from diffattn.training.muon import MuonWithAdamW
from diffattn.training.objective import Draw, LossBins, VelocityLoss, draw
from diffattn.training.processes import agree, asked_to_stop, on_main, shared
from diffattn.training.ranges import FREE_TO_CHANGE
from diffattn.training.resume import HINT, Saved, without_null_class
from diffattn.training.signals import Stopped, StopRequest


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of one step, from 0: linear warm-up, then constant, or along half a cosine or a line to
    `final_lr`, which step `steps` would have."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = min((step - config.warmup) / max(steps - config.warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    low = 1.0 if config.schedule == "constant" else config.final_lr
    return config.lr * (low + (1 - low) * shape)


def _optimizer_of(model: DiT, optim: OptimConfig) -> torch.optim.Optimizer:
    if optim.name == "muon":
        return MuonWithAdamW(model, optim.lr, optim.weight_decay, optim.betas, optim.eps)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


@dataclass
class Trainer:
    """Trains a model: holds its data, optimizer and progress.

    Args:
        config: the run.
        model: on its device; its numbers of mediators are trained together, one drawn per step.
        batches: of this process.
        accelerator: of accelerate; decides processes, device and precision.
        distillation: from a softmax teacher, or None.
        on_step: called after every step with the trainer and the log, on every process; used for sample grids
            and evaluation.
        progress: of the run so far.
        stop: set when a signal asks the run to stop.
        weights: each of `ranges.WEIGHTS` -> hash of the weights there, or None.
    """

    config: TrainConfig
    model: DiT
    batches: Batches
    accelerator: Accelerator
    distillation: Distillation | None = None
    on_step: Callable[["Trainer", StepLog], None] | None = None
    progress: TrainProgress = field(default_factory=TrainProgress)
    stop: StopRequest = field(default_factory=StopRequest)
    weights: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss_of = VelocityLoss(self.config.objective, self.model.config["num_classes"])
        self.wrapped: nn.Module
        self.optimizer: Any
        self.wrapped, self.optimizer = self._prepared()
        if self.config.run.compile:
            self.model.compile()
        self.ema = EMAModel(self.model.parameters(), decay=self.config.optim.ema, foreach=True)
        self.root = Path(self.config.run.out) / "checkpoints"
        self.bins = LossBins(self.config.objective.bins, self.accelerator.device)
        self.bad_in_a_row = 0
        self.saved_step: int | None = None  # of the latest checkpoint

    def _prepared(self) -> tuple[Any, Any]:
        """Model and optimizer as accelerate wraps them; a sharded model stays this object and gets other parameters."""
        optim = self.config.optim
        if self.accelerator.is_fsdp2:  # autocast decides what is bf16; FSDP would also round t and gradients
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = MixedPrecisionPolicy()
        return self.accelerator.prepare(self.model, _optimizer_of(self.model, optim))

    # --- resume and save ---

    def resume(self, saved: Saved) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it was made with other classes, pictures or another configuration; the message names what
                differs.
        """
        if "classes" in saved.state:  # missing from checkpoints of earlier versions
            check_classes(self.batches.dataset.class_names, saved.state["classes"])
        differing = self._differing(saved.state["config"], saved.state.get("weights"))
        if saved.state["data"] != self.batches.fingerprint:
            differing.append("the pictures (another data.source, or changed files)")
        if differing:
            raise shared(ValueError(f"{saved.folder} was made with another configuration: {'; '.join(differing)}"))
        tensors = saved.tensors
        if not self.model.config["null_class"]:
            tensors = without_null_class(tensors, self.model.config["num_classes"])
        state.restore(self.model, self.ema, self.optimizer.optimizer, tensors)
        self.ema.optimization_step = saved.state["ema_step"]
        checkpoints.restore_random_states(saved.tensors["random"])
        self.progress = TrainProgress(**saved.state["progress"])
        self.saved_step = self.progress.step
        self.weights = saved.state.get("weights", self.weights)
        start = saved.state["config"]["model"]["start"]  # which the run began from
        self.config = replace(self.config, model=replace(self.config.model, start=start))

    def _differing(self, before: dict[str, dict[str, Any]], weights: dict[str, str | None] | None) -> list[str]:
        """What prevents resuming a run of this configuration that had these weights; None: not known, as in checkpoints
        of earlier versions, where paths are compared and sizes had the last word."""
        if weights is None:
            free = FREE_TO_CHANGE - {"data.vae", "objective.distill"}
            return differing_fields(TrainConfig.of_earlier(before, self.config, free), self.config, free)
        compared = {name: found for name, found in self.weights.items() if name != "model.start"}  # by `run`
        changed = [f"the weights of {name}" for name, found in compared.items() if found != weights.get(name)]
        return [*differing_fields(TrainConfig.from_dict(before), self.config), *changed]

    def check_processes(self) -> None:
        """Compare step and weights over all processes, every one of which must call it.

        Raises:
            ValueError: they differ; on every process.
        """
        if self.accelerator.num_processes > 1:
            weights = state.digest(self.model)[:12]
            agree(self.accelerator, {"the step": self.progress.step, "the weights": weights}, HINT)

    def save(self) -> None:
        """Write a checkpoint. Every process must call it; the main one writes.

        Raises:
            OSError: it could not be written; on every process.
            NonFiniteLoss: the weights are not finite; on every process.
        """
        writes = self.accelerator.is_main_process
        tensors = {
            "model": state.model_tensors(self.model, keep=writes),
            "ema": state.ema_tensors(self.ema, self.model, keep=writes),
            "optimizer": state.optimizer_tensors(self.optimizer.optimizer, self.model, keep=writes),
            "random": checkpoints.random_states(),
        }
        rest = {
            "config": self.config.to_dict(),
            "data": self.batches.fingerprint,
            "classes": list(self.batches.dataset.class_names),
            "progress": vars(self.progress),
            "ema_step": self.ema.optimization_step,
            "weights": self.weights,
        }
        step, keep = self.progress.step, self.config.run.keep

        def write() -> None:
            for part in ("model", "ema"):
                check_finite(tensors[part], f"the checkpoint of step {step}")
            checkpoints.save(self.root, step, tensors, rest, keep)

        on_main(self.accelerator, write)
        self.saved_step = step

    # --- steps ---

    def train(self, log: StepLog) -> None:
        """Train up to the configured number of steps, saving periodically and at the end.

        Raises:
            NonFiniteLoss: after `run.max_bad_steps` bad steps in a row, or at the end if the weights are not finite.
            OSError: the last checkpoint could not be written; earlier failures are logged and retried.
            Stopped: by a signal, once all completed steps are in a checkpoint.
        """
        self.wrapped.train()
        run = self.config.run
        log.begin(self.progress)
        for x, y in self.batches.iterate(self.progress.step):
            if self.progress.step >= run.steps:
                break
            with log.timed(self.progress):
                loss, norm = self.step(x, y)
            self.progress.step += 1
            log.add(StepDone(loss, norm, self.optimizer.param_groups[0]["lr"]), self.progress, self.bins)
            if self.on_step is not None:
                self.on_step(self, log)
            if signal := asked_to_stop(self.accelerator, self.stop):
                self._stop(signal)
            if self.progress.step % run.save_every == 0 and self.progress.step < run.steps:
                self._try_to_save(log)
        log.flush(self.progress, self.bins)
        if self.saved_step != self.progress.step:
            self.save()

    def _try_to_save(self, log: StepLog) -> None:
        """Write a periodic checkpoint; training continues if that fails."""
        try:
            self.save()
        except (OSError, NonFiniteLoss) as error:
            log.say(f"checkpoint at step {self.progress.step} not written: {error}; {self._what_is_there()}")

    def _what_is_there(self) -> str:
        return "there is no checkpoint yet" if self.saved_step is None else f"that of step {self.saved_step} stays"

    def _stop(self, signal: int) -> None:
        """Save the progress and raise `Stopped`."""
        step = self.progress.step
        try:
            if self.saved_step != step:
                self.save()
        except (OSError, NonFiniteLoss) as error:
            lost = f"at step {step}, whose checkpoint could not be written: {error}; {self._what_is_there()}"
            raise Stopped(signal, lost) from None
        folder = checkpoints.folder_of(self.root, step)
        raise Stopped(signal, f"at step {step}; checkpoint saved to {folder}, run the same command to resume")

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on this process's samples; mean unweighted loss and gradient norm, on the device.

        Raises:
            NonFiniteLoss: see `train`.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, self.progress.step, config.run.steps)
        drawn = self._draw(x)
        if drawn.num_mediators is not None:
            self.model.set_num_mediators(drawn.num_mediators)
        parts = self._parts(len(x))
        total = torch.zeros((), device=self.accelerator.device)
        for i, rows in enumerate(parts):
            syncing = contextlib.nullcontext() if i == len(parts) - 1 else self.accelerator.no_sync(self.wrapped)
            with syncing:
                loss = self._loss(x[rows], y[rows], drawn.rows(rows))
                self.accelerator.backward(loss[0] * (rows.stop - rows.start) / len(x))
            total += loss[1] * (rows.stop - rows.start) / len(x)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = state.whole(torch.as_tensor(nn.utils.clip_grad_norm_(trained, config.optim.clip or math.inf)))
        self._update(bool(torch.isfinite(norm)))
        return total, norm

    def _loss(self, x: Tensor, y: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
        """Loss for the gradient and unweighted mean loss of some samples."""
        teaching = self.distillation.watching() if self.distillation else contextlib.nullcontext()
        with self.accelerator.autocast(), teaching:
            loss, unweighted = self.loss_of(self.wrapped, x, y, drawn)
        self.bins.add(drawn.t, unweighted)
        mean = loss.mean()
        if self.distillation is not None:
            mean = mean + self.config.objective.distill_weight * self.distillation.loss()
        return mean, unweighted.mean()

    def _draw(self, x: Tensor) -> Draw:
        """This process's rows of the global batch's random numbers."""
        objective, run = self.config.objective, self.config.run
        rank = self.accelerator.process_index
        batch = self.config.optim.batch
        drawn = draw(objective, run.seed, self.progress.step, batch, tuple(x.shape[1:]), self.model.mediators)
        return drawn.rows(slice(rank * len(x), (rank + 1) * len(x)))

    def _parts(self, samples: int) -> list[slice]:
        """Equal parts of this process's samples, one per pass."""
        size = math.ceil(samples / self.config.optim.accumulation)
        return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]

    def _update(self, finite: bool) -> None:
        """Step the optimizer and the averaged weights, or skip a bad step; the norm is the same on every process."""
        if finite:
            self.optimizer.step()
            self.ema.step(self.model.parameters())
            self.bad_in_a_row = 0
        else:
            self.progress.skipped += 1
            self.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_in_a_row >= self.config.run.max_bad_steps:
            text = (
                f"loss or gradient not finite in {self.bad_in_a_row} steps in a row, the last one step "
                f"{self.progress.step}; try a lower optim.lr, optim.clip=1, or run.precision=fp32"
            )
            raise shared(NonFiniteLoss(text))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[DiT]:
        """Use the averaged weights and evaluation mode within the block."""
        number = self.model.num_mediators
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        try:
            yield self.model
        finally:
            self.ema.restore(self.model.parameters())
            self.model.num_mediators = number
            self.model.train()
