"""The cost of a run, estimated before it begins: `--dry-run`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffattn.measure.flops import forward_gflops
from diffattn.models import DiT
from diffattn.training.config import TrainConfig
from diffattn.training.distill import freeze_backbone, own_parameters
from diffattn.training.muon import is_inner_matrix

BYTES = 4
"""Of a number in fp32, in which weights, gradients, moments and averages are kept."""


@dataclass(frozen=True)
class Hardware:
    """The processes and precision of a run."""

    processes: int = 1
    device: str = "cpu"
    sharded: bool = False  # FSDP2; else every process holds the whole model
    precision: str = "fp32"  # of the matrix products; weights and their averages are fp32

    def __str__(self) -> str:
        if self.processes == 1:
            how = "not distributed"
        else:
            how = "model sharded over them (FSDP2)" if self.sharded else "model replicated on each (DDP)"
        return f"{self.processes} on {self.device}, {how}, precision {self.precision}"


@dataclass(frozen=True)
class TrainPlan:
    """Figures of a run."""

    parameters: int
    gflops: dict[str, float]  # number of mediators, or the attention -> one forward pass of one sample
    weight_gib: float  # weights, gradients, optimizer, average of one process
    activation_gib: float  # of the samples that one process holds at once
    steps: int
    batch: int
    batch_per_process: int
    epochs: float | None
    hardware: Hardware = Hardware()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; the hardware's are on the same level as the others."""
        figures = dict(vars(self))
        return figures | vars(figures.pop("hardware"))

    def lines(self) -> list[str]:
        """Human-readable lines."""
        per_n = ", ".join(f"{name}: {g:.3g}" for name, g in self.gflops.items())
        epochs = "" if self.epochs is None else f" ({self.epochs:.1f} epochs)"
        return [
            f"parameters        {self.parameters / 1e6:.2f} M",
            f"GFLOPs per image  {per_n} (one forward pass, multiply-adds x 2, by attention or number of mediators)",
            f"processes         {self.hardware}",
            f"memory            {self.weight_gib:.2f} GiB weights, gradients, optimizer, average "
            f"+ about {self.activation_gib:.2f} GiB activations",
            f"steps             {self.steps}{epochs}",
            f"batch             {self.batch} in total, {self.batch_per_process} per process and pass",
        ]


def make_plan(
    config: TrainConfig, arguments: dict[str, Any], samples: int | None = None, hardware: Hardware | None = None
) -> TrainPlan:
    """Count parameters, floating-point operations and bytes on the meta device: nothing is computed.

    A teacher is assumed to be as large as the model without what mediators and others add.

    Args:
        config: the run.
        arguments: of the `DiT`.
        samples: pictures in the data, if known.
        hardware: shares each batch; None: one process on the CPU, in the configuration's precision.
    """
    hardware = hardware or Hardware(precision=config.run.precision.replace("auto", "fp32"))
    with torch.device("meta"):
        model = DiT(**arguments)
    if config.model.freeze_backbone:
        freeze_backbone(model)
    micro = max(config.optim.batch // hardware.processes // config.optim.accumulation, 1)
    numbers = model.mediators or (None,)
    item_bytes = 2 if hardware.precision == "bf16" else 4
    holders = hardware.processes if hardware.sharded else 1
    return TrainPlan(
        parameters=sum(p.numel() for p in model.parameters()),
        gflops={model.attention_label if n is None else str(n): forward_gflops(model, n) for n in numbers},
        weight_gib=BYTES * (_numbers_kept(model, config.optim.name) / holders + _taught(config, model)) / 2**30,
        activation_gib=micro * _saved_bytes(model, config.run.gradient_checkpointing) * item_bytes / BYTES / 2**30,
        steps=config.run.steps,
        batch=config.optim.batch,
        batch_per_process=micro,
        epochs=None if samples is None else config.run.steps * config.optim.batch / samples,
        hardware=hardware,
    )


def _numbers_kept(model: DiT, optimizer: str) -> int:
    """How many numbers a run keeps: every weight and its average; of those trained also the gradient, and the moments,
    of which AdamW has two and Muon one."""
    kept = 0
    for name, parameter in model.named_parameters():
        moments = 1 if optimizer == "muon" and is_inner_matrix(name, parameter) else 2
        kept += parameter.numel() * (2 + (1 + moments) * parameter.requires_grad)
    return kept


def _taught(config: TrainConfig, model: DiT) -> int:
    """About how many weights a teacher has, which every process holds: those that the model has without its own."""
    if config.objective.distill is None:
        return 0
    own = own_parameters(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in own)


def _saved_bytes(model: DiT, checkpointing: bool) -> float:
    """Bytes that one sample's forward pass keeps for the backward pass, in fp32, without weights.

    With gradient checkpointing: what is outside the blocks, the input of every block, and the inside of one block.
    """
    kept = _kept_bytes(model)
    if not checkpointing:
        return kept
    rows, columns = model.grid
    model.enable_gradient_checkpointing()
    outside = _kept_bytes(model)
    inputs = sum(step.width * len(step.blocks) for step in model.steps) * rows * columns
    return outside + BYTES * inputs + (kept - outside) / len(model.blocks)


def _kept_bytes(model: DiT) -> int:
    """See `_saved_bytes`, of a model as it is."""
    parameters = {id(p) for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # kept alive, so that no id is reused

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters and base.shape[:1] == (1,):
            sizes[id(base)] = base.numel() * base.element_size()
            kept.append(base)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*_one_sample(model)).sample.sum()
    return sum(sizes.values())


def _one_sample(model: DiT) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs x [1, c, H, W], t [1], y [1] on the meta device."""
    h, w = (side * model.patch_size for side in model.grid)
    with torch.device("meta"):
        return torch.empty(1, model.in_channels, h, w), torch.empty(1), torch.empty(1, dtype=torch.long)
