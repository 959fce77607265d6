"""Checks of options: each raises a `ValueError` that names the option, what is allowed, and the value."""

from math import isfinite


def check(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise unless `holds`."""
    if not holds:
        raise ValueError(f"{option} must be {allowed}, got {value!r}")


def is_int(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`; True and False are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are not numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
