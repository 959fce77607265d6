"""The checkpoint from which a run resumes: the main process decides, and every process must have the same.

All machines of a run must share `run.out` (at least its `checkpoints` when a run is resumed), the same
pictures, and the same files for `model.start`, `objective.distill` and `data.vae`, at whatever paths. Only the main
process writes checkpoints, so with `run.out` on local disks the other machines cannot resume: the run ends with an
error on every process instead of continuing from different weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffattn.training import checkpoints
from diffattn.training.processes import agree, on_main
from diffattn.training.start import CLASS_TABLE

HINT = (
    "run.out must be one folder that all machines share (or the same copy of its checkpoints on each), and no process "
    "of an earlier launch may still run"
)


@dataclass(frozen=True)
class Saved:
    """A loaded checkpoint, see `checkpoints.load`."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["progress"]["step"]


def without_null_class(tensors: dict[str, dict[str, Tensor]], num_classes: int) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint for a model without a null class.

    Checkpoints of earlier versions have its row in the class table even where label dropout was 0.
    """
    return {
        part: {
            name: tensor[:num_classes] if CLASS_TABLE in name and tensor.shape[:1] == (num_classes + 1,) else tensor
            for name, tensor in by_name.items()
        }
        for part, by_name in tensors.items()
    }


def agreed_checkpoint(root: Path, accelerator: Accelerator) -> Saved | None:
    """The newest complete checkpoint according to the main process, read by every process; None to start from scratch.

    Args:
        root: this process's folder of checkpoints.
        accelerator: of the run; every process must call this.

    Raises:
        ValueError: on every process: the newest checkpoint is damaged (the message names it, and an older one that is
            whole), or the processes see different checkpoints.
    """
    saved = on_main(accelerator, lambda: _newest(root))
    chosen = [None if saved is None else saved.folder.name]
    broadcast_object_list(chosen)
    seen = "none" if saved is None else _description(saved.folder)
    if not accelerator.is_main_process:
        saved, seen = _counterpart(root, chosen[0])
    agree(accelerator, {"the checkpoint to resume from": seen}, HINT)
    return saved


def _newest(root: Path) -> Saved | None:
    folder = checkpoints.latest(root)
    if folder is None:
        return None
    try:
        return Saved(folder, *checkpoints.load(folder))
    except ValueError as error:
        raise ValueError(f"{error}; {_way_out(root, folder)}") from None


def _way_out(root: Path, damaged: Path) -> str:
    """Advice if the newest checkpoint is damaged, naming the newest older one that is intact."""
    for folder in reversed([f for f in checkpoints.complete(root) if f != damaged]):
        try:
            checkpoints.load(folder)
        except ValueError:
            continue
        step = int(folder.name.removeprefix("step-"))
        return f"{folder.name} is intact: delete {str(damaged)!r} and run the same command to resume at step {step}"
    return "no older checkpoint is intact: delete the folder of checkpoints to start from scratch"


def _counterpart(root: Path, name: str | None) -> tuple[Saved | None, str]:
    """Another process's copy of the main process's checkpoint, and its label for comparison among processes."""
    own = checkpoints.latest(root)
    if name is None:
        return None, "none" if own is None else _description(own)
    try:
        saved = Saved(root / name, *checkpoints.load(root / name))
    except ValueError as error:
        missing = "none" if own is None else f"no {name}, the newest is {own.name}"
        return None, missing if not (root / name).is_dir() else str(error)
    return saved, _description(saved.folder)


def _description(folder: Path) -> str:
    """ "step-00000020, weights 1a2b3c4d5e6f" """
    return f"{folder.name}, weights {checkpoints.checksum(folder / 'model.safetensors')[:12]}"
