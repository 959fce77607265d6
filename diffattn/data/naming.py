"""Formatting of names and counts in messages."""

from collections.abc import Sequence


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(repr(name) for name in names[:most]) + (f" and {rest} more" if rest > 0 else "")


def plural(count: int, what: str) -> str:
    """ "1 picture", "2 pictures", "2 classes"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"
