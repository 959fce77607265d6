"""The configuration of tuning, and the amount of work it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffattn.schedules import MAX_PHASES
from diffattn.tuning.probe import COSTS, TIME


class CannotTune(ValueError):
    """A budget that cannot be met, or a model on which nothing can be saved; the message says what is possible."""


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; exactly one of the two budgets must be given.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    max_error: float | None = None  # ‖x - x*‖ / ‖x*‖ of the final latents, mean over prompts, in (0, 1]
    min_speedup: float | None = None  # of the denoiser's calls over a run, above 1
    steps: int = 25
    guidance: float | None = None  # None: the embedded model's own, or 7.5
    width: int | None = None  # pixels; None: what the model was trained for
    height: int | None = None
    seed: int = 0  # prompt i has the seed `seed + i`
    bands: int = 4  # of noise levels, with about as many steps each
    probed: int = 4  # most prompts whose errors are analysed; all prompts are used to verify
    checks: int = 8  # most recipes to verify, besides one per method to choose among methods
    cost: str = TIME  # "time", measured here, or "flops", counted
    rounds: int = 5  # of timing
    presets: bool = False  # also measure the fixed presets, each against a recipe that is as close

    def __post_init__(self) -> None:
        if (self.max_error is None) == (self.min_speedup is None):
            raise ValueError("give either a largest error (max_error) or a smallest speed-up (min_speedup)")
        error, speedup = self.max_error, self.min_speedup
        _check(error is None or 0 < error <= 1, "max_error", error, "above 0 and at most 1")
        _check(speedup is None or 1 < speedup < math.inf, "min_speedup", speedup, "a number above 1")
        for name in ("bands", "probed", "checks", "rounds"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _check(self.bands <= MAX_PHASES, "bands", self.bands, f"at most {MAX_PHASES}")
        _check(self.cost in COSTS, "cost", self.cost, " or ".join(COSTS))


@dataclass(frozen=True)
class Workload:
    """Upper bounds of the denoiser calls that tuning makes, by purpose."""

    calls: Mapping[str, int]
    calls_per_run: int  # of one picture, unless the sampler calls more than once per step

    @property
    def total(self) -> int:
        """All calls."""
        return sum(self.calls.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {what}" for what, n in self.calls.items())
        return f"up to {self.total} denoiser calls, as many as {self.total / self.calls_per_run:.0f} pictures ({parts})"


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
