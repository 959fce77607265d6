"""One training run, from its configuration to the exported pipeline."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffattn.data.classes import check_classes
from diffattn.data.datasets import in_memory
from diffattn.models import DiT
from diffattn.training import checkpoints, state
from diffattn.training.batches import Batches
from diffattn.training.distill import Distillation, freeze_backbone
from diffattn.training.latents import cache_latents
from diffattn.training.log import StepLog
from diffattn.training.loop import Trainer
from diffattn.training.samples import pipeline_of
from diffattn.training.setup import Say, Setup
from diffattn.training.start import class_names_of, load_backbone, make_model
from diffattn.training.watch import Watcher

CONFIG_FILE = "config.json"


def train(setup: Setup) -> Path:
    """Train, or go on where a killed run stopped; the folder of the exported pipeline.

    Raises:
        ValueError: the run's folder has checkpoints of another configuration.
        NonFiniteLoss, OSError: see `Trainer.train`.
    """
    config, accelerator, say = setup.config, setup.accelerator, setup.say
    out = Path(config.run.out)
    examples = prepared(setup)
    torch.manual_seed(config.run.seed)
    resuming = checkpoints.latest(out / "checkpoints") is not None
    if config.model.start and not resuming and (names := class_names_of(config.model.start)):
        check_classes(setup.dataset.class_names, names)
    model, new = make_model(setup.arguments, None if resuming else config.model.start, accelerator.device)
    if config.model.start and not resuming:
        say(f"weights from {config.model.start}; {len(new)} of the parameters are new")
    if config.model.freeze_backbone:
        freeze_backbone(model)
    if config.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    batches = Batches(
        examples, config.optim.batch, seed=config.run.seed, rank=accelerator.process_index,
        world_size=accelerator.num_processes, flip=config.data.flip, num_workers=config.data.num_workers,
        device=accelerator.device,
    )  # fmt: skip
    trainer = Trainer(config, model, batches, accelerator, teacher_of(setup, model), Watcher(setup))
    if trainer.resume():
        say(f"going on at step {trainer.progress.step}")
    processes = accelerator.num_processes
    say(
        f"batch {config.optim.batch} in all, {config.optim.batch // processes} per process; {processes} on "
        f"{accelerator.device.type}, precision {'fp32' if accelerator.mixed_precision == 'no' else 'bf16'}"
    )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    accelerator.init_trackers("diffattn")
    trainer.train(StepLog(accelerator, config.run.log_every, say))
    for tracker in accelerator.trackers:
        tracker.finish()
    return export(setup, trainer)


def finish() -> None:
    """Let go of the other processes; the last thing that a program does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepared(setup: Setup) -> Any:
    """The data in the form the loop takes them: decoded in memory, or as cached latents."""
    data, accelerator = setup.config.data, setup.accelerator
    if setup.vae is None:
        return in_memory(setup.dataset, telling(setup.say, "decoded")) if data.in_memory else setup.dataset
    folder = Path(data.cache or Path(setup.config.run.out) / "latents")
    with accelerator.main_process_first():
        return cache_latents(
            setup.dataset, setup.vae.to(accelerator.device), folder, device=accelerator.device,
            num_workers=data.num_workers, progress=telling(setup.say, "encoded"),
        )  # fmt: skip


def telling(say: Say, what: str, seconds: float = 5.0) -> Callable[[int, int], None]:
    """A progress callback that says "decoded 2000 of 50000 pictures" every few seconds."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > seconds:
            said = time.monotonic()
            say(f"{what} {done} of {total} pictures")

    return progress


def teacher_of(setup: Setup, model: DiT) -> Distillation | None:
    """The distillation that the configuration asks for."""
    name = setup.config.objective.distill
    if name is None:
        return None
    return Distillation(model, load_backbone(name, setup.arguments["num_heads"]).to(setup.accelerator.device))


def export(setup: Setup, trainer: Trainer) -> Path:
    """The averaged weights as a `SiTPipeline` folder, `pipeline` in the run's folder."""
    folder = Path(setup.config.run.out) / "pipeline"
    weights = state.ema_tensors(trainer.ema, trainer.model)
    if setup.accelerator.is_main_process:
        averaged = DiT(**setup.arguments)
        averaged.load_state_dict(weights)
        pipeline_of(averaged.eval(), setup.dataset.class_names, setup.vae).save_pretrained(folder)
        setup.say(f"pipeline written to {folder}")
    setup.accelerator.wait_for_everyone()
    return folder
