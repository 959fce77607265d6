"""Writes the table of denoisers from the rows that patching itself reads.

As a hook of mkdocs it replaces `<!-- denoisers -->` and `<!-- not covered -->` in a page.
"""

from collections.abc import Sequence
from typing import Any

from diffattn.architectures import ARCHITECTURES
from diffattn.architectures.transformers import Time, TransformerFamily
from diffattn.architectures.uncovered import NOT_COVERED

MARK, UNCOVERED_MARK = "<!-- denoisers -->", "<!-- not covered -->"

ORDER = {"none": "picture alone", "first": "text, picture", "last": "picture, text"}


def denoisers_table() -> str:
    """One row per family."""
    head = ("classes", "order of tokens", "places as rotations", "time argument")
    return _table(head, [_row(family) for family in ARCHITECTURES])


def not_covered_table() -> str:
    """One row per class that has nothing to accelerate."""
    return _table(("class", "because"), [(f"`{name}`", reason) for name, reason in sorted(NOT_COVERED.items())])


def _row(family: Any) -> tuple[str, ...]:
    if not isinstance(family, TransformerFamily):
        return (family.title, ORDER["none"], "no", "the scheduler's")
    names = ", ".join(f"`{name}`" for name in family.classes)
    order = ORDER[family.context] + (" (keys only)" if family.keys_only else "")
    return (names, order, "yes" if family.rotated else "no", _time(family.time))


def _time(time: Time) -> str:
    """How a denoiser's argument follows from the scheduler's time step t, 1000 noise ... 0 data."""
    base = "1000 - t" if time.from_data else "t"
    if time.scale == 1:
        return base
    return f"({base}) / {time.scale:g}" if time.from_data else f"{base} / {time.scale:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the tables in the places of their marks."""
    for mark, write in ((MARK, denoisers_table), (UNCOVERED_MARK, not_covered_table)):
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown
