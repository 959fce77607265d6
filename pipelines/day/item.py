"""One item of the day, and where all of them run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.machine import describe_machine, dtype_name

Measure = Callable[[float], dict[str, Any]]
"""From the time (`time.monotonic`) after which no further round begins, to a result of JSON types. Its `complete` is
false where that came too early; calling it again resumes, or starts over."""


@dataclass(frozen=True)
class Item:
    """What is measured in one go."""

    name: str  # unique; of its file
    kind: str  # which table it stands in
    title: str
    minutes: float  # estimated, on one large GPU
    measure: Measure


@dataclass(frozen=True)
class Setting:
    """The device of the day, and its folder."""

    device: torch.device
    dtype: torch.dtype
    out: Path
    tiny: bool = False  # a rehearsal: the same with tiny models and sizes

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 25

    @property
    def backend(self) -> str:
        """The backend of `torch.compile`."""
        return "eager" if self.tiny else "inductor"

    def conditions(self) -> dict[str, Any]:
        """The conditions that all results of a folder share, as JSON types."""
        return {"machine": describe_machine(self.device), "dtype": dtype_name(self.dtype), "tiny": self.tiny}
