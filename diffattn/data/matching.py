"""Pairs the pictures of two sets: by name, by a number in the name, or by order.

Shapes: N pictures in each set.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from diffattn.data.naming import few
from diffattn.data.order import parts

MAX_DIGITS = 20  # of a number that gives a position

_Key = Mapping[Hashable, int]
"""What identifies each picture of a set -> its index."""


@dataclass(frozen=True)
class Matching:
    """Pairs of pictures."""

    partners: tuple[int, ...]
    """[N]: for each picture of the first set, the index of its partner in the second."""
    how: str
    """"name", "number" or "order"."""

    def __str__(self) -> str:
        return f"{len(self.partners)} pairs by {self.how}"


def match(first: Sequence[str], second: Sequence[str], places: bool = False) -> Matching:
    """Pair the pictures of two sets.

    They are paired by name if both sets have the same names, whatever their endings and folders: "a/0.jpg" and
    "b/0.png". Otherwise they are paired by a number, if both have the same numbers: "0.png", "00000.png" and
    "prefix_00000_.png"; or by order, if names and numbers have nothing in common.

    Args:
        first, second: names in natural order, paths with forward slashes.
        places: the names of one of the sets are only positions, as in an array. Consecutive numbers of the other,
            whatever they begin with, are then paired by order.

    Raises:
        ValueError: not as many on both sides, pictures without a partner, or more than one way to pair them; the
            message names pictures.
    """
    for keys, how in ((_by_name, "name"), (_by_number, "number")):
        found = _agreed(list(keys(first)), list(keys(second)), how)
        if found is not None:
            return found
    if len(first) != len(second):
        raise ValueError(
            f"pairs need as many pictures on both sides, got {len(first)} and {len(second)}; they do not pair: "
            + _alone(first, second)
        )
    follow = places and all(any(map(_consecutive, _by_number(names))) for names in (first, second))
    if not follow and (alone := _partly(first, second)):
        raise ValueError(
            f"names or numbers of the {len(first)} pictures agree in part, so they do not pair: {alone}; give both "
            "sets the same names or numbers"
        )
    return Matching(tuple(range(len(first))), "order")


def check_turns(names: Sequence[str], count: int) -> None:
    """Raise `ValueError` if the order of pictures would give them other prompts than their numbers.

    Args:
        names: of the pictures, in natural order: number i takes the prompt i modulo `count`.
        count: how many prompts there are.
    """
    for key in _by_number(names):
        numbers = [int(found[1]) for found in key if _is_single(found)]
        first = min(numbers, default=0)
        missing = sorted(set(range(first, max(numbers, default=0) + 1)) - set(numbers))
        if len(numbers) == len(key) and missing and len(numbers) + len(missing) <= count:
            absent = few([str(number) for number in missing])
            raise ValueError(
                f"the {len(names)} pictures are numbered from {first} to {max(numbers)} without {absent}, so which of "
                f"the {count} prompts belongs to which is unclear: add the pictures, or number those that are there "
                "without gaps and leave the other prompts out"
            )


def _agreed(first: Sequence[_Key], second: Sequence[_Key], how: str) -> Matching | None:
    """The pairs that equal keys give; None without equal keys, an error if they contradict each other."""
    found: dict[tuple[int, ...], tuple[_Key, _Key]] = {}
    for a in first:
        for b in second:
            if a.keys() == b.keys():
                by_index = {index: b[key] for key, index in a.items()}
                found.setdefault(tuple(by_index[i] for i in range(len(a))), (a, b))
    if len(found) > 1:
        raise ValueError(
            f"the pictures pair by {how} in {len(found)} ways, since several numbers in their names fit; "
            "give both sets the same names"
        )
    return Matching(next(iter(found)), how) if found else None


def _by_name(names: Sequence[str]) -> Iterator[_Key]:
    """Names with folders if they identify every picture, otherwise names without."""
    stems = [_stem(name) for name in names]
    for key in (names, stems, [stem.rpartition("/")[2] for stem in stems]):
        yield from _unique(key)


def _by_number(names: Sequence[str]) -> Iterator[_Key]:
    """Every number of the file names that identifies all pictures, and all numbers together."""
    numbers = [parts(_stem(name).rpartition("/")[2])[1::2] for name in names]
    width = {len(found) for found in numbers}
    if width == {0} or not numbers:
        return
    if len(width) == 1:
        varying = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    else:
        varying = [[found[place] for found in numbers] for place in (0, -1)] if 0 not in width else []
    for column in varying:
        yield from _unique(column)
    if len(varying) > 1:
        yield from _unique(list(zip(*varying, strict=True)))


def _unique(keys: Sequence[Any]) -> Iterator[_Key]:
    found = {key: index for index, key in enumerate(keys)}
    if len(found) == len(keys):
        yield found


def _stem(name: str) -> str:
    """A name without the ending of the file."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.rpartition(".")
    return folder + slash + (stem if dot and stem and not ending.isdecimal() else file)


def _partly(first: Sequence[str], second: Sequence[str]) -> str:
    """Pictures without a partner by keys that only some pictures share; empty if none are shared."""
    for keys in (_by_number, _by_name):
        for a in keys(first):
            for b in keys(second):
                if a.keys() & b.keys():
                    return _without(first, a, b) + "; " + _without(second, b, a)
    return ""


def _consecutive(numbers: _Key) -> bool:
    """Whether these are single numbers without a gap."""
    values = sorted(int(key[1]) for key in numbers if _is_single(key))
    return len(values) == len(numbers) and values[-1] - values[0] == len(values) - 1


def _is_single(key: Any) -> TypeGuard[tuple[int, str]]:
    """Whether a key is one number, of a size that Python converts."""
    return isinstance(key, tuple) and isinstance(key[1], str) and key[0] <= MAX_DIGITS


def _without(names: Sequence[str], own: _Key, other: _Key) -> str:
    return f"{few([names[index] for key, index in own.items() if key not in other], 3)} without a partner"


def _alone(first: Sequence[str], second: Sequence[str]) -> str:
    """The surplus pictures of sets of unequal size."""
    if partly := _partly(first, second):
        return partly
    least = min(len(first), len(second))
    return f"{few(list(first[least:]) + list(second[least:]), 3)} without a partner"
