"""Thresholds of the step-wise switch between numbers of mediators, under a budget of floating-point operations.

Every pair of thresholds gives a picture per seed, a mean cost, and a distance from the picture drawn with the largest
number of mediators from the same noise. The answer is the closest pair within the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from math import inf
from typing import Any

import torch
from torch import Tensor

from diffattn.drawing.request import Request
from diffattn.measure.flops import forward_gflops
from diffattn.methods.mediator import MediatorAttention
from diffattn.patching.patch import patch
from diffattn.sampling import SiTPipeline
from diffattn.schedules import LatentChangeSchedule


@dataclass(frozen=True)
class SearchConfig:
    """How to search.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    samples: int = 32  # pictures, cycling through the classes
    batch: int = 16
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    ratios: tuple[float, ...] = (1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # candidate thresholds
    first: int = 3
    distance: str = "l1"
    per_sample: bool = True

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "steps", "first"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.ratios or not all(0 < ratio < inf for ratio in self.ratios):
            raise ValueError(f"ratios must be numbers above 0, got {self.ratios}")
        # Those who use the rest know its ranges.
        Request("", "", steps=self.steps, guidance=self.guidance, seed=self.seed, num_images=self.samples)
        LatentChangeSchedule(
            [{}, {}], self.ratios[:1], first=self.first, distance=self.distance, per_sample=self.per_sample
        )


@dataclass(frozen=True)
class Candidate:
    """The cost and error of one choice of thresholds."""

    thresholds: tuple[float, ...]  # empty: one number of mediators throughout
    num_mediators: int | None  # that number
    gflops: float  # per picture, all evaluations, mean over pictures
    error: float  # ‖x - x*‖ / ‖x*‖ of the drawn latents against the largest number of mediators
    calls: Mapping[int, float]  # number of mediators -> share of the transformer's calls

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"calls": {str(n): share for n, share in self.calls.items()}}


class ThresholdSearch:
    """The search on one pipeline.

    Args:
        pipe: unpatched, with a transformer that learned at least two numbers of mediators.
        config: how to search.

    Raises:
        ValueError: the transformer has fewer than two numbers of mediators.
    """

    def __init__(self, pipe: SiTPipeline, config: SearchConfig) -> None:
        self.pipe, self.config = pipe, config
        self.mediators: tuple[int, ...] = pipe.transformer.mediators
        if len(self.mediators) < 2:
            raise ValueError(f"switching needs at least two numbers of mediators; this model has {self.mediators}")
        self.gflops = {n: forward_gflops(pipe.transformer, n) for n in self.mediators}
        self._exact = self._latents(None)[0]

    def schedule(self, thresholds: Sequence[float]) -> LatentChangeSchedule:
        """The schedule with these thresholds."""
        return LatentChangeSchedule(
            [{"num_mediators": n} for n in self.mediators],
            thresholds,
            first=self.config.first,
            distance=self.config.distance,
            per_sample=self.config.per_sample,
        )

    @property
    def num_candidates(self) -> int:
        """The number of choices."""
        return len(self.mediators) + len(self._choices())

    def _choices(self) -> list[tuple[float, ...]]:
        """Every falling choice of thresholds."""
        ratios = sorted(self.config.ratios, reverse=True)
        return list(combinations_with_replacement(ratios, len(self.mediators) - 1))

    def candidates(self, on_each: Callable[[Candidate], None] | None = None) -> list[Candidate]:
        """Every constant number of mediators, then every falling choice of thresholds."""
        found = []
        for n, thresholds in [*((n, ()) for n in self.mediators), *((None, c) for c in self._choices())]:
            schedule = self.schedule(thresholds) if thresholds else {0.0: {"num_mediators": n}}
            found.append(self._candidate(thresholds, n, *self._latents(schedule)))
            if on_each is not None:
                on_each(found[-1])
        return found

    def _candidate(self, thresholds: tuple[float, ...], n: int | None, latents: Tensor, calls: list[int]) -> Candidate:
        error = (latents - self._exact).norm() / self._exact.norm()
        shares = {m: calls.count(m) / len(calls) for m in self.mediators}
        evaluations = len(calls) / self.config.samples
        gflops = evaluations * sum(self.gflops[m] * share for m, share in shares.items())
        return Candidate(thresholds, n, gflops, float(error), shares)

    def _latents(self, schedule: Any) -> tuple[Tensor, list[int]]:
        """The latents drawn under a schedule (None: the largest number), and the number of mediators in every call of
        every sample (guidance calls count twice)."""
        if schedule is None:
            schedule = {0.0: {"num_mediators": self.mediators[-1]}}
        config, classes = self.config, self.pipe.transformer.config["num_classes"]
        drawn, calls = [], []
        with patch(self.pipe, MediatorAttention.name, schedule=schedule) as patched:
            options = patched.plan.schedule.phases
            for start in range(0, config.samples, config.batch):
                indices = range(start, min(start + config.batch, config.samples))
                generators = [torch.Generator().manual_seed(config.seed + i) for i in indices]
                output: Any = self.pipe(
                    [i % classes for i in indices], num_inference_steps=config.steps, guidance_scale=config.guidance,
                    generator=generators, output_type="latent", return_trace=True,
                )  # fmt: skip
                drawn.append(output.images)
                rows = len(indices) * (2 if config.guidance != 1 else 1)
                for call in output.trace or ():
                    phases = call["phase"] if isinstance(call["phase"], list) else [call["phase"]] * rows
                    calls += [options[p]["num_mediators"] for p in phases]
        return torch.cat(drawn), calls


def best_within(candidates: Sequence[Candidate], budget: float) -> Candidate:
    """The candidate with the smallest error whose cost is within the budget, in GFLOPs per picture.

    Raises:
        ValueError: there is none; the message names the cheapest.
    """
    affordable = [c for c in candidates if c.gflops <= budget * (1 + 1e-9)]
    if not affordable:
        cheapest = min(c.gflops for c in candidates)
        raise ValueError(
            f"no schedule costs at most {budget:.4g} GFLOPs per picture; the cheapest costs {cheapest:.4g}"
        )
    return min(affordable, key=lambda c: (c.error, c.gflops))


def thresholds_recipe(candidate: Candidate, search: ThresholdSearch, model: str, budget: float) -> dict[str, Any]:
    """A recipe for `diffattn.patch`, with the protocol of the search."""
    schedule: dict[str, Any] = {"0.0": {"num_mediators": candidate.num_mediators}}
    if candidate.thresholds:
        schedule = search.schedule(candidate.thresholds).to_dict()
    protocol = {"model": model, "budget": budget, "found": candidate.to_dict(), "search": asdict(search.config)}
    return {"method": MediatorAttention.name, "schedule": schedule, "protocol": protocol}
