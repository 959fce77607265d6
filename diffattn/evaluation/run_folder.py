"""The folder of an evaluation: its protocol, the work done so far, and how processes share it.

Work is cut into fixed chunks; process r of W takes the chunks r, r + W, … and writes each file whole. A killed run can
therefore be resumed, and several processes that share the folder arrive at the same result as one.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffattn.files import read_json, write_json, write_whole

RUN = "run.json"
DECISIONS = "decisions.json"
"""The acceleration's decisions by timing, which a resumed run follows."""

DONE = ("*/[0-9]*.png", "*/[0-9]*.safetensors")


@dataclass(frozen=True)
class Processes:
    """This process's place among all."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None  # until all processes are here

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes results."""
        return self.rank == 0


def processes(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes of `accelerate launch` or torchrun, a single one otherwise; and the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(), device
    from accelerate import PartialState

    # A finished process waits for the others however long they take: an interrupt leaves uneven shares.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    place = device if state.device is None else state.device
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone), place


class RunFolder:
    """The folder in which an evaluation keeps its pictures and features.

    Attributes:
        path: the folder.
        among: this process among all.
    """

    def __init__(self, path: str | Path, protocol: Mapping[str, Any], among: Processes) -> None:
        """Resume the run in the folder, or start one if it is empty.

        Raises:
            ValueError: the folder holds a run under another protocol; all fields that differ are named.
        """
        self.path, self.among = Path(path), among
        stored = read_json(self.path / RUN) if self._is_begun() else None
        if stored is not None:
            keys = sorted(stored.keys() | protocol.keys())
            pairs = {key: (stored.get(key), protocol.get(key)) for key in keys}
            wrong = "; ".join(f"{key}: {was!r}, now {now!r}" for key, (was, now) in pairs.items() if was != now)
            if wrong:
                raise ValueError(f"{str(path)!r} contains a run under another protocol: {wrong}; choose another folder")
        among.wait()
        if among.is_main and stored is None:
            write_json(self.path / RUN, protocol)
        among.wait()

    def _is_begun(self) -> bool:
        """Whether the folder holds results that another run would overwrite."""
        return (self.path / RUN).exists() and any(next(self.path.glob(kind), None) for kind in DONE)

    def decisions(self) -> dict[str, bool | float]:
        """What was decided by timing so far; see `Patch.decisions`."""
        path = self.path / DECISIONS
        return read_json(path) if path.is_file() else {}

    def add_decisions(self, made: Mapping[str, bool | float]) -> None:
        """Store decisions, except for kinds of calls that already have one."""
        stored = self.decisions()
        if made.keys() - stored.keys():
            write_json(self.path / DECISIONS, {**made, **stored})

    def mine(self, total: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of this process's chunks of `size` of `total` things."""
        for number in range(self.among.rank, -(-total // size), self.among.count):
            yield number, number * size, min((number + 1) * size, total)

    def chunk(self, kind: str, number: int) -> Path:
        """The file of a chunk."""
        return self.path / kind / f"{number:06d}.safetensors"

    def write(self, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a chunk, see `write_whole`."""
        whole = {name: x.contiguous() for name, x in tensors.items()}
        write_whole(self.chunk(kind, number), lambda part: save_file(whole, part))

    def gather(self, kind: str, total: int, size: int) -> dict[str, Tensor]:
        """All chunks, joined in order."""
        chunks = [load_file(self.chunk(kind, number)) for number in range(-(-total // size))]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
