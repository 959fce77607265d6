"""What follows from rounds of timed runs: every ratio compares times of one round."""

from collections.abc import Mapping, Sequence

from diffattn.measure.interleave import Spread

from . import SDPA

Rounds = Sequence[Mapping[str, float]]
"""Seconds of the variants in every round; a variant need not be in all of them."""


def missing(rounds: Rounds, names: Sequence[str], wanted: int) -> list[str]:
    """The variants that are in fewer than `wanted` rounds."""
    return [name for name in names if sum(name in r for r in rounds) < wanted]


def ratio(rounds: Rounds, name: str, reference: str = SDPA) -> Spread | None:
    """Time over that of the reference in the same round; None if they never met in one."""
    found = [r[name] / r[reference] for r in rounds if name in r and reference in r]
    return Spread.of(found) if found else None


def share_of_saving(rounds: Rounds, name: str, floor: str) -> Spread | None:
    """How much of the time that `floor` saves over exact attention `name` saves, round by round.

    None if they never met in a round, or the floor saved nothing there.
    """
    met = [r for r in rounds if {name, floor, SDPA} <= set(r) and r[floor] < r[SDPA]]
    return Spread.of([(r[SDPA] - r[name]) / (r[SDPA] - r[floor]) for r in met]) if met else None


def seconds(rounds: Rounds, name: str) -> Spread | None:
    """The time of one run; None if there is none."""
    found = [r[name] for r in rounds if name in r]
    return Spread.of(found) if found else None


def names_in(rounds: Rounds) -> list[str]:
    """All variants, in the order of their first run."""
    return list(dict.fromkeys(name for r in rounds for name in r))


def gains(rounds: Rounds) -> list[tuple[str, str, Spread]]:
    """(combined variant, one of its parts, time of that part alone over that of the combination)."""
    found = []
    for name in names_in(rounds):
        for part in name.split("+") if "+" in name else ():
            spread = ratio(rounds, part, name)
            if spread is not None:
                found.append((name, part, spread))
    return found
