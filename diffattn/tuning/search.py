"""Chooses a route of the calibration and how far to go on it, measured with whole runs rather than estimated."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from diffattn.measure.interleave import interleave
from diffattn.tuning.calibrate import calibrate, denoiser_cost
from diffattn.tuning.config import CannotTune, TuneConfig
from diffattn.tuning.ladder import Rung, climb, tighten
from diffattn.tuning.probe import FLOPS
from diffattn.tuning.runs import PipelineRuns, relative_error
from diffattn.tuning.settings import MIXED, Setting, recipe_of

FAR = 4  # routes expected to be this many times as far off as the nearest are not compared
ALONE = 1.5  # with a single prompt, the promise is its error times this


@dataclass(frozen=True)
class Verified:
    """One measured recipe."""

    route: str  # the settings that it chose from, see `routes_of`, and the speed-up, if that was given
    rungs: int  # number of steps away from exact attention
    errors: tuple[float, ...]  # relative error of the final latents, per prompt
    expected: float  # predicted by the calibration
    expected_speedup: float

    @property
    def error(self) -> float:
        """Mean over the prompts."""
        return sum(self.errors) / len(self.errors)

    @property
    def promise(self) -> float:
        """An upper bound for the mean over other prompts: the mean plus two standard errors."""
        if len(self.errors) == 1 or not math.isfinite(self.error):
            return ALONE * self.error
        return self.error + 2 * statistics.stdev(self.errors) / math.sqrt(len(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON types; null for an error that is not finite."""
        found = asdict(self) | {"errors": list(self.errors), "error": self.error, "promise": self.promise}
        return {name: _finite(value) for name, value in found.items()}


@dataclass(frozen=True)
class Rival:
    """A fixed preset, and a recipe that is at least as close on the same prompts."""

    preset: str  # "method/preset"
    error: float  # mean over the prompts, as for a recipe
    speedup: float
    tuned: Verified | None  # None if the preset accelerates nothing at this size, or if no recipe is as close
    tuned_speedup: float | None

    @property
    def is_beaten(self) -> bool | None:
        """Whether the recipe is as close and at least as fast; None if there is nothing to compare."""
        if self.error == 0:
            return None
        return self.tuned_speedup is not None and self.tuned_speedup >= self.speedup

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON types."""
        return asdict(self) | {"tuned": self.tuned and self.tuned.to_dict(), "is_beaten": self.is_beaten}


class Search:
    """The search on one pipeline.

    Args:
        runs: of the unpatched pipeline, watched.
        settings: the choices.
        config: how to tune.

    Raises:
        CannotTune: nothing can be saved.
    """

    def __init__(self, runs: PipelineRuns, settings: Sequence[Setting], config: TuneConfig) -> None:
        self.runs, self.settings, self.config = runs, settings, config
        probed = min(len(runs.requests), config.probed)
        self.found = calibrate(runs, settings, config.bands, probed, config.cost, config.rounds)
        self.orders = dict(self.found.routes)  # and, by another name, those tightened for a speed-up
        self.checks: list[Verified] = []
        self.speedups: dict[tuple[str, int], float] = {}  # by route and rungs, measured after they were chosen

    def best(self) -> Verified:
        """The recipe to use.

        Raises:
            CannotTune: the budget cannot be met; the message says what is possible.
        """
        budget, speedup = self.config.max_error, self.config.min_speedup
        if budget is not None:
            return self._fastest_within(budget, lambda tried: tried.promise)
        assert speedup is not None
        return self._nearest_at(speedup)

    def recipe(self, route: str, rungs: int) -> dict[str, Any]:
        """The recipe after this many rungs of a route, without its promises."""
        return recipe_of(self.found.choice(self.orders[route][:rungs]), self.found.bounds, self.settings)

    def rival(self, method: str, preset: str) -> Rival:
        """Measure a preset on the same prompts, and find the fastest recipe whose mean error is not larger."""
        name, fixed = f"{method}/{preset}", {"method": method, "preset": preset}
        errors = self._errors(fixed)
        error = sum(errors) / len(errors)
        if error == 0:
            return Rival(name, 0.0, 1.0, None, None)
        try:
            tuned = self._fastest_within(error, lambda tried: tried.error)
        except CannotTune:  # closer than the first rung
            return Rival(name, error, self.speedup(fixed), None, None)
        return Rival(name, error, self.speedup(fixed), tuned, self.speedup(self.recipe(tuned.route, tuned.rungs)))

    def _fastest_within(self, budget: float, measure: Callable[[Verified], float]) -> Verified:
        """Find the last rung whose error is within the budget, on the route that saves most there."""
        route, scale = self._fastest_route(budget, measure)
        expected, tries = [r.error for r in self.found.routes[route]], 0
        known = [(check.rungs, measure(check) <= budget) for check in self.checks if check.route == route]
        low = max((rungs for rungs, fits in known if fits), default=0)
        high = min((rungs for rungs, fits in known if not fits and rungs > low), default=len(expected) + 1)
        while low + 1 < high and tries < self.config.checks:
            last_try = low == 0 and tries == self.config.checks - 1
            tried = self._verify(route, 1 if last_try else climb(expected, budget, low, high, scale))
            low, high = (tried.rungs, high) if measure(tried) <= budget else (low, tried.rungs)
            scale, tries = _ratio(tried, measure) or scale, tries + 1
        within = [check for check in self.checks if measure(check) <= budget]
        if not within:
            least = min(map(measure, self.checks))
            raise CannotTune(f"no recipe stays within an error of {budget:g}; the nearest tried has {least:.3g}")
        return max(within, key=lambda check: check.expected_speedup)

    def _fastest_route(self, budget: float, measure: Callable[[Verified], float]) -> tuple[str, float]:
        """The route on which the budget should buy most, and its ratio of measured to expected errors.

        With several routes, one recipe of each is verified to measure the ratio.
        """
        if len(self.found.routes) == 1:
            return MIXED, 1.0
        savings, scales = {}, {}
        for route, rungs in self.found.routes.items():
            tried = self._verify(route, max(_within(rungs, budget), 1))
            scales[route] = _ratio(tried, measure) or (1.0 if math.isfinite(tried.error) else math.inf)
            last = _within(rungs, budget / scales[route])
            savings[route] = rungs[last - 1].saving if last else 0.0
        best = max(savings, key=lambda route: savings[route])
        return best, scales[best]

    def _nearest_at(self, speedup: float) -> Verified:
        """Find the first rung that is fast enough, on the route that is nearest there."""
        route, mixed = self._nearest_route(speedup)
        most = self.speedup(self.recipe(mixed, len(self.orders[mixed])))
        if most < speedup:
            raise CannotTune(
                f"a speed-up of {speedup:g} cannot be reached: every layer at its cheapest setting gives {most:.3g}"
            )
        if route != mixed and self.speedup(self.recipe(route, len(self.orders[route]))) < speedup:
            route = mixed
        low, high = 0, len(self.orders[route])
        for _ in range(self.config.checks):
            if low + 1 >= high:
                break
            middle = (low + high) // 2
            low, high = (low, middle) if self.speedup(self.recipe(route, middle)) >= speedup else (middle, high)
        # The search stops where times happened to be good, so the promised speed-up is measured once more.
        for rungs in range(high, min(high + self.config.checks, len(self.orders[route]) + 1)):
            found = self.speedups[route, rungs] = self.speedup(self.recipe(route, rungs))
            if found >= speedup:
                return self._verify(route, rungs)
        most = max(self.speedups.values())
        raise CannotTune(f"a speed-up of {speedup:g} was measured once, but not again: {most:.3g} at most")

    def _nearest_route(self, speedup: float) -> tuple[str, str]:
        """The route with the smallest error where it is expected to be fast enough, and the one of all settings.

        With several that may be the nearest, one recipe of each is verified.
        """
        least, named, reached = (1 - 1 / speedup) * self.found.cost, f"{{}} at {speedup}".format, {}
        for route, rungs in self.found.routes.items():
            order = self.orders[named(route)] = tuple(tighten(rungs, least))
            enough = next((i for i, rung in enumerate(order, 1) if rung.saving >= least), None)
            if enough is not None:
                reached[named(route)] = (enough, order[enough - 1].error)
        mixed, nearest = named(MIXED), min((error for _, error in reached.values()), default=0.0)
        compared = [route for route, (_, error) in reached.items() if error <= FAR * nearest]
        if len(compared) < 2:
            return (*compared, mixed)[0], mixed
        return min(compared, key=lambda route: self._verify(route, reached[route][0]).error), mixed

    def _verify(self, route: str, rungs: int) -> Verified:
        """Run all prompts; recipes that were verified before are not run again."""
        if known := [check for check in self.checks if (check.route, check.rungs) == (route, rungs)]:
            return known[0]
        last = self.orders[route][rungs - 1]
        speedup = 1 / max(1 - last.saving / self.found.cost, 1e-3)
        self.checks.append(Verified(route, rungs, self._errors(self.recipe(route, rungs)), last.error, speedup))
        return self.checks[-1]

    def _errors(self, recipe: Mapping[str, Any]) -> tuple[float, ...]:
        """Relative error of the final latents of every prompt."""
        with self.runs.patched(recipe):
            return tuple(relative_error(self.runs.latents(i), x) for i, x in enumerate(self.found.exact))

    def speedup(self, recipe: Mapping[str, Any]) -> float:
        """The speed-up of a run's denoiser calls; both sides take turns, call by call."""
        calls, shares = self.found.calls[0], self.found.shares
        if self.config.cost == FLOPS:
            with self.runs.patched(recipe):
                return self.found.cost / denoiser_cost(self.runs, calls, shares, FLOPS, 1)
        variants = {
            (tuned, b): lambda c=c: self.runs.replay(c) for b, c in enumerate(calls) for tuned in ("exact", "tuned")
        }
        timings = interleave(
            {f"{tuned} {b}": call for (tuned, b), call in variants.items()},
            self.config.rounds,
            device=self.runs.device,
            around=lambda name: self._patched(recipe, name) if name.startswith("tuned") else nullcontext(),
        )
        seconds = {
            side: [sum(n * r[f"{side} {b}"] for b, n in enumerate(shares)) for r in timings.rounds]
            for side in ("exact", "tuned")
        }
        return statistics.median(e / t for e, t in zip(seconds["exact"], seconds["tuned"], strict=True))

    @contextmanager
    def _patched(self, recipe: Mapping[str, Any], name: str) -> Iterator[None]:
        """Keep one run with the recipe open within the block, in the band that the name ends with."""
        call = self.found.calls[0][int(name.split()[1])]
        with self.runs.patched(recipe) as handle:
            handle.begin_run(*call.args, **call.kwargs)
            yield


def _within(rungs: Sequence[Rung], error: float) -> int:
    """How many rungs are expected to stay within an error."""
    return sum(rung.error <= error for rung in rungs)


def _ratio(tried: Verified, measure: Callable[[Verified], float]) -> float | None:
    """Measured by expected error; None if that is not known."""
    known = 0 < measure(tried) < math.inf and tried.expected > 0
    return measure(tried) / tried.expected if known else None


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
