"""Processes, device and precision requested by accelerate's launcher and the configuration: honoured or refused."""

import os
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)

from diffattn.training.config import TrainConfig
from diffattn.training.plan import Hardware

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Launcher variables of unsupported features -> their names. Training replicates (DDP) or shards (FSDP2) the model."""

DEVICES = ("cpu", "auto")
"""What a run can be told to train on; which GPU is the launcher's choice, and "auto" follows it."""

A_YEAR = 365 * 24 * 60.0  # minutes
PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16"}


def make_accelerator(config: TrainConfig, device: str = "auto") -> Accelerator:
    """The `Accelerator` of a run.

    Args:
        config: its precision, trackers, folder and timeout.
        device: one of `DEVICES`.

    Raises:
        ValueError: another device, or the launcher asks for something that training does not support; the message names
            it.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be {' or '.join(DEVICES)} (accelerate's choice), got {device!r}")
    _check_launcher()
    trackers = [name for name in config.run.trackers if name != "tensorboard" or find_spec("tensorboard")]
    accelerator = Accelerator(
        mixed_precision="bf16" if _precision(config, device) == "bf16" else "no",
        cpu=device == "cpu",
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=config.run.out,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),  # biases of other numbers of mediators
            InitProcessGroupKwargs(timeout=timedelta(minutes=min(config.run.timeout_minutes, A_YEAR))),
        ],
    )
    if _asked("ACCELERATE_USE_FSDP"):
        if config.optim.name == "muon":
            raise ValueError(
                "optim.name=muon needs whole weight matrices, which a sharded model (FSDP2) does not have; use "
                "optim.name=adamw, or replicate the model"
            )
        _shard(accelerator)
    return accelerator


def hardware_of(accelerator: Accelerator) -> Hardware:
    """The hardware of a run, for its plan."""
    return Hardware(
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        sharded=accelerator.is_fsdp2,
        precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
    )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_launcher() -> None:
    for variable, name in REFUSED.items():
        if _asked(variable):
            raise ValueError(
                f"the launcher asks for {name}, which training does not support; it replicates the model (no "
                "--config_file), or shards it with pipelines/accelerate/fsdp2.yaml"
            )
    if _asked("ACCELERATE_USE_FSDP") and (found := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"the launcher asks for fsdp_version {found}; training shards with fsdp_version: 2 only")
    if (passes := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("", "1"):
        raise ValueError(
            f"the launcher asks for gradient_accumulation_steps {passes}; set optim.accumulation={passes} instead"
        )


def _precision(config: TrainConfig, device: str) -> str:
    """ "fp32" or "bf16": `run.precision`, else the launcher's choice, else what the hardware supports."""
    if config.run.precision != "auto":
        return config.run.precision
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in PRECISIONS:
        raise ValueError(f"the launcher asks for mixed_precision {asked!r}; training supports {', '.join(PRECISIONS)}")
    has_bf16 = device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else PRECISIONS[asked]


def _shard(accelerator: Accelerator) -> None:
    """Shard on CPUs too, where accelerate itself replicates despite its launcher's request."""
    state: Any = accelerator.state
    sharded = state.distributed_type == DistributedType.FSDP and getattr(state, "fsdp_plugin", None) is not None
    if accelerator.num_processes == 1 or sharded:
        return
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
