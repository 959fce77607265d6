"""Natural ordering of names, and representative selections from them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, fill the unit interval evenly and match no period."""

_NUMBER = re.compile(r"([0-9]+)")


def natural_key(name: str) -> Any:
    """Sort key under which numbers in names are compared as numbers: "2.png" before "10.png".

    Folders, separated by slashes, are compared one by one. Names that differ in leading zeros only are ordered as text.
    """
    return [parts(folder) for folder in name.split("/")], name


def parts(name: str) -> list[Any]:
    """Texts and numbers of a name in turn, a text first and last: "a07b" -> ["a", (1, "7"), "b"].

    A number is its count of digits and the digits, without leading zeros: these compare as the numbers do, and names
    from elsewhere may have more digits than Python converts.
    """
    found: list[Any] = _NUMBER.split(name)
    bare = [digits.lstrip("0") or "0" for digits in found[1::2]]
    found[1::2] = [(len(digits), digits) for digits in bare]
    return found


def natural_order(names: Iterable[str]) -> list[str]:
    """The names sorted by `natural_key`."""
    return sorted(names, key=natural_key)


def stratified(names: Sequence[str], count: int, spread: bool = False) -> list[int]:
    """Select names so that every folder has its share.

    Args:
        names: paths with forward slashes, in the relevant order.
        count: how many to take; all of them if there are fewer.
        spread: take names from all over each folder instead of its first ones.

    Returns:
        Indices in `names`, ascending. The same names give the same indices.
    """
    folders: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folders.setdefault(name.rpartition("/")[0], []).append(index)
    count, total = min(count, len(names)), len(names)
    chosen, end, taken = [], 0, 0
    for inside in folders.values():
        end += len(inside)
        upto = (2 * count * end + total) // (2 * total)  # the share of all folders so far, rounded
        chosen += _spread(inside, upto - taken) if spread else inside[: upto - taken]
        taken = upto
    return sorted(chosen)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Choose `count` indices evenly, but not at equal steps, which might always hit the same class."""
    found: dict[int, None] = {}
    multiple = 0.5
    while len(found) < count:
        found[int(multiple * GOLDEN % 1 * len(indices))] = None
        multiple += 1
    return [indices[place] for place in found]
