"""A schedule that records what it observes: a public way to follow the runs of a patched model."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffattn import NoiseSchedule


class Watching(NoiseSchedule):
    """A `NoiseSchedule` that keeps the noise levels and phases of every call; every run has its own copy of a
    schedule, so they are kept in lists that copies share."""

    def __init__(self, entries: Mapping[float, Any]) -> None:
        super().__init__(entries)
        self.levels: list[list[float]] = []
        self.seen_phases: list[int | tuple[int, ...]] = []

    def observe(self, latents: Any, noise_levels: Sequence[float]) -> None:
        super().observe(latents, noise_levels)
        self.levels.append(list(noise_levels))
        self.seen_phases.append(self.phase())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watching":
        new = Watching({b: "exact" if p is None else p for b, p in zip(self.bounds, self.phases, strict=True)})
        new.levels, new.seen_phases = self.levels, self.seen_phases
        return new
