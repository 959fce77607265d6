"""One training run, from its configuration to the exported pipeline."""

import gc
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffattn.data.classes import check_classes
from diffattn.data.datasets import in_memory
from diffattn.files import write_json
from diffattn.models import DiT
from diffattn.training import state
from diffattn.training.batches import Batches
from diffattn.training.config import TrainConfig
from diffattn.training.distill import Distillation, check_frozen, freeze_backbone
from diffattn.training.encode import Encoding, vae_hash
from diffattn.training.finite import check_finite
from diffattn.training.latents import cache_together
from diffattn.training.lock import locked
from diffattn.training.log import StepLog
from diffattn.training.loop import Trainer
from diffattn.training.processes import agree, on_main
from diffattn.training.resume import Saved, agreed_checkpoint
from diffattn.training.samples import pipeline_of
from diffattn.training.setup import Say, TrainSetup
from diffattn.training.signals import Stopped, StopRequest, listening
from diffattn.training.start import class_names_of, load_backbone, make_model, weights_hash
from diffattn.training.watch import Watcher

CONFIG_FILE = "config.json"
SAME = "start all processes with the same command, on the same data and files"


def train(setup: TrainSetup) -> Path:
    """Train, or resume an earlier run of the same configuration; returns the folder of the exported pipeline.

    Raises:
        ValueError: the run's folder is in use, has checkpoints of another configuration or a damaged one, or the
            processes disagree, see `agreed_checkpoint`.
        Stopped: by a signal, once all completed steps are in a checkpoint.
        NonFiniteLoss, OSError: see `Trainer.train`.
    """
    out = Path(setup.config.run.out)
    with ExitStack() as held:
        stop = held.enter_context(listening())
        on_main(setup.accelerator, lambda: held.enter_context(locked(out, setup.say)))
        trainer = _trainer(setup, stop)
        trainer.check_processes()
        _announce(setup, trainer)
        _write_config(setup, trainer.config)
        run = setup.config.run
        log = StepLog(setup.accelerator, run.log_every, run.steps, setup.config.optim.batch, setup.say)
        _start_trackers(setup)
        try:
            trainer.train(log)
        finally:
            log.finish()
        return export(setup, trainer)


def _trainer(setup: TrainSetup, stop: StopRequest) -> Trainer:
    """Data, model and optimizer, at the step where the run begins or resumes."""
    config, accelerator, say = setup.config, setup.accelerator, setup.say
    _check_inputs(setup)
    saved = agreed_checkpoint(Path(config.run.out) / "checkpoints", accelerator)
    examples = prepared(setup, stop)
    torch.manual_seed(config.run.seed)
    start = config.model.start if saved is None else None
    if saved is not None:
        on_main(accelerator, lambda: _check_start(config.model.start, saved))
    if start and (names := class_names_of(start)):
        check_classes(setup.dataset.class_names, names)
    if start and accelerator.num_processes > 1:
        agree(accelerator, {"the weights of model.start": weights_hash(start)}, SAME)
    model, new = make_model(setup.arguments, start, accelerator.device)
    if start:
        say(f"weights from {start}; {len(new)} of the parameters are new")
    if config.model.freeze_backbone:
        freeze_backbone(model)
        if saved is None:
            check_frozen(model, new)
    if config.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    batches = Batches(
        examples, config.optim.batch, seed=config.run.seed, rank=accelerator.process_index,
        world_size=accelerator.num_processes, flip=config.data.flip, num_workers=config.data.num_workers,
        device=accelerator.device,
    )  # fmt: skip
    teacher, watcher = teacher_of(setup, model), Watcher(setup, stop)
    weights = {
        "data.vae": None if setup.vae is None else vae_hash(setup.vae),
        "model.start": weights_hash(start),
        "objective.distill": weights_hash(config.objective.distill),
    }
    trainer = Trainer(config, model, batches, accelerator, teacher, watcher, stop=stop, weights=weights)
    if saved is not None:
        trainer.resume(saved)
    return trainer


def _check_start(start: str | None, saved: Saved) -> None:
    """Raise `ValueError` if a run that is to be resumed began from other weights than the configuration's."""
    before, hashes = saved.state["config"]["model"]["start"], saved.state.get("weights")
    if start in (None, before):
        return
    if hashes is None or weights_hash(start) != hashes["model.start"]:
        began = "fresh weights" if before is None else f"model.start={before!r}"
        raise ValueError(
            f"{saved.folder} began from {began}, not from {start!r}: leave out model.start to resume it, or choose "
            "another run.out"
        )


def _check_inputs(setup: TrainSetup) -> None:
    """Raise `ValueError` on every process if they were given different configurations, pictures or weights."""
    config = setup.config
    if setup.accelerator.num_processes == 1:
        return
    values = {
        "the configuration": config.fingerprint(),
        "the pictures": setup.dataset.fingerprint,
        "the classes": ", ".join(setup.dataset.class_names)[:200],
        "data.vae": None if setup.vae is None else vae_hash(setup.vae)[:12],
        "objective.distill": weights_hash(config.objective.distill),
    }
    agree(setup.accelerator, values, SAME)


def _announce(setup: TrainSetup, trainer: Trainer) -> None:
    batch, hardware = setup.config.optim.batch, setup.plan.hardware
    if trainer.saved_step is not None:
        setup.say(f"resuming at step {trainer.progress.step}")
    setup.say(f"batch {batch} in total, {batch // hardware.processes} per process; {hardware}")


def _write_config(setup: TrainSetup, config: TrainConfig) -> None:
    """Write the configuration for users to read; a run does not depend on it, since checkpoints also contain it."""
    if setup.accelerator.is_main_process:
        try:
            write_json(Path(setup.config.run.out) / CONFIG_FILE, config.to_dict())
        except OSError as error:
            setup.say(f"{CONFIG_FILE} not written: {error}")


def _start_trackers(setup: TrainSetup) -> None:
    try:
        setup.accelerator.init_trackers("diffattn")
    except Exception as error:  # a tracker may raise any error of its library
        setup.say(f"no figures are tracked: {error}")


def finish() -> None:
    """Leave the process group; call this last."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a sharded model has its own groups, whose threads must end before the program does
        torch.distributed.barrier()  # no process leaves while another one still communicates with it
        torch.distributed.destroy_process_group()


def prepared(setup: TrainSetup, stop: StopRequest) -> Any:
    """The data in the form the loop needs: decoded in memory, or as cached latents."""
    data = setup.config.data
    if setup.vae is None:
        return (
            in_memory(setup.dataset, _until(stop, reporting(setup.say, "decoded"))) if data.in_memory else setup.dataset
        )
    folder = Path(data.cache or Path(setup.config.run.out) / "latents")
    encoding = Encoding(
        setup.dataset, setup.vae, folder, device=setup.accelerator.device, num_workers=data.num_workers
    )  # fmt: skip
    try:
        return cache_together(encoding, setup.accelerator, stop, reporting(setup.say, "encoded"))
    except Stopped as error:
        raise Stopped(error.signal, "while latents were encoded; run the same command to encode the rest") from None


def _until(stop: StopRequest, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Wrap a progress callback so that it raises `Stopped` once a signal has arrived."""

    def checked(done: int, total: int) -> None:
        if stop.signal:
            raise Stopped(stop.signal, "while pictures were decoded; there was nothing to save")
        progress(done, total)

    return checked


def reporting(say: Say, what: str, seconds: float = 5.0) -> Callable[[int, int], None]:
    """A progress callback that prints "decoded 2000 of 50000 pictures" every few seconds."""
    printed = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > seconds:
            printed = time.monotonic()
            say(f"{what} {done} of {total} pictures")

    return progress


def teacher_of(setup: TrainSetup, model: DiT) -> Distillation | None:
    """The distillation that the configuration asks for."""
    name = setup.config.objective.distill
    if name is None:
        return None
    return Distillation(model, load_backbone(name, setup.arguments["num_heads"]).to(setup.accelerator.device))


def export(setup: TrainSetup, trainer: Trainer) -> Path:
    """Export the averaged weights as a `SiTPipeline` to `pipeline` in the run's folder, replaced atomically.

    Raises:
        OSError: it could not be written; on every process. The checkpoint is kept, so the same command exports again.
        NonFiniteLoss: the weights are not finite.
    """
    folder = Path(setup.config.run.out) / "pipeline"
    weights = state.ema_tensors(trainer.ema, trainer.model)
    on_main(setup.accelerator, lambda: _write_pipeline(setup, weights, folder))
    setup.say(f"pipeline written to {folder}")
    return folder


def _write_pipeline(setup: TrainSetup, weights: dict[str, Tensor], folder: Path) -> None:
    check_finite(weights, "the pipeline")
    averaged = DiT(**setup.arguments)
    averaged.load_state_dict(weights)
    pipe = pipeline_of(averaged.eval(), setup.dataset.class_names, setup.vae, setup.config.own_guidance)
    fresh, old = folder.with_name(".pipeline-writing"), folder.with_name(".pipeline-old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        pipe.save_pretrained(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the pipeline could not be written to {str(folder)!r}: {error}") from error
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
