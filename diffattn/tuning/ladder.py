"""Orders the places in which to give up exactness, by their costs and errors. Pure Python.

A place is a layer in a band of noise levels. Squared errors of different places add up (their directions have little
in common), and so do savings; hence the best choices for all budgets can be made place by place. On the lower convex
hull of (saving, squared error) of a place every step from one setting to the next cheaper one has a price, error
per saving; taking all steps of all places in the order of their prices goes through every Lagrangian optimum.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

Place = tuple[str, int]
"""A layer, and a band."""


@dataclass(frozen=True)
class Option:
    """One setting in one place."""

    setting: int
    saving: float  # per run, in the unit of the cost; above 0
    error: float  # ε: expected relative error of the final latents, alone


@dataclass(frozen=True)
class Rung:
    """One step: in a place, from what was there before to a cheaper setting."""

    place: Place
    setting: int
    price: float  # added squared error per added saving
    saving: float  # of all steps up to this one
    error: float  # ε of all steps up to this one


def hull(options: Iterable[Option]) -> list[Option]:
    """The options on the lower convex hull of (saving, squared error), from the origin (exact), by saving.

    Options that save nothing or whose error is not finite are excluded.
    """
    usable = [o for o in options if o.saving > 0 and isfinite(o.error)]
    found: list[Option] = []
    for option in sorted(usable, key=lambda o: (o.saving, -o.error)):
        while found and _price(found[-2] if len(found) > 1 else None, found[-1]) >= _price(found[-1], option):
            found.pop()
        found.append(option)
    return found


def ladder(places: Mapping[Place, Sequence[Option]]) -> list[Rung]:
    """All steps of all places, lowest price in error first."""
    steps = []
    for place, options in places.items():
        before = None
        for option in hull(options):
            saved = option.saving - (before.saving if before else 0)
            added = option.error**2 - (before.error**2 if before else 0)
            steps.append((_price(before, option), saved, added, place, option.setting))
            before = option
    saving = squared = 0.0
    rungs = []
    for price, saved, added, place, setting in sorted(steps, key=lambda step: step[0]):
        saving, squared = saving + saved, squared + added
        rungs.append(Rung(place, setting, price, saving, sqrt(max(squared, 0.0))))
    return rungs


def tighten(rungs: Sequence[Rung], least: float) -> list[Rung]:
    """The same steps in an order that reaches a saving with less to spare.

    Steps of the ladder can be large. Of those that first reach the saving, the ones it does not need are put off,
    those of the highest price first.

    Args:
        rungs: of a ladder.
        least: the saving, in the unit of the cost.
    """
    before = [(0.0, 0.0), *((rung.saving, rung.error**2) for rung in rungs)]
    steps = [(r, r.saving - saving, r.error**2 - squared) for r, (saving, squared) in zip(rungs, before, strict=False)]
    reach = next((i for i, rung in enumerate(rungs, 1) if rung.saving >= least), 0)
    spare, needed, put_off = rungs[reach - 1].saving - least if reach else 0.0, [], []
    for step in reversed(steps[:reach]):
        rung, saved, _ = step
        if saved <= spare and all(rung.place != later.place for later, *_ in needed):
            spare -= saved
            put_off.append(step)
        else:
            needed.append(step)
    saving = squared = 0.0
    found = []
    for rung, saved, added in [*reversed(needed), *reversed(put_off), *steps[reach:]]:
        saving, squared = saving + saved, squared + added
        found.append(replace(rung, saving=saving, error=sqrt(max(squared, 0.0))))
    return found


def _price(before: Option | None, after: Option) -> float:
    """Added squared error per added saving, relative to exact attention if there is no previous step."""
    saved = after.saving - (before.saving if before else 0)
    added = after.error**2 - (before.error**2 if before else 0)
    return added / saved if saved > 0 else float("inf") if added > 0 else float("-inf")


def climb(values: Sequence[float], budget: float, low: int, high: int, scale: float) -> int:
    """The next position to try between two known ones: `low` meets the budget, `high` does not.

    Args:
        values: expected at positions 1, 2 ... (rising).
        budget: the largest value allowed.
        low, high: with low + 1 < high; position 0 is exact.
        scale: ratio of measured to expected, as far as known.

    Returns:
        The highest position expected to meet the budget, an eighth away from the ends so that few tries suffice.
    """
    assert low + 1 < high
    inside = range(low + 1, high)
    expected = [k for k in inside if values[k - 1] * scale <= budget]
    guess = max(expected, default=inside[0])
    margin = len(inside) // 8
    return min(max(guess, inside[0] + margin), inside[-1] - margin)
