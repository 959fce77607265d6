"""JSON that strangers send: what is nested deeper, or has numbers longer, than anybody writes is refused."""

import json
from typing import Any

MAX_DEPTH = 32  # objects and lists within each other
MAX_DIGITS = 20  # of a whole number; Python's own have no end, and overflow where they meet a float


def read_text(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: not JSON, nested more than `MAX_DEPTH` deep, or with a whole number of more than `MAX_DIGITS`.
    """
    try:
        found = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise _too_deep()
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _parts(whole: Any) -> Any:
    if isinstance(whole, dict):
        return whole.values()
    return whole if isinstance(whole, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep")
