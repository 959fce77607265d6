"""Cells of timing tables, and the line that names the machine they were measured on; shared by all reports."""

from collections.abc import Mapping
from typing import Any

from diffattn.machine import where

TIMING_HEAD = ("seconds", "IQR", "speed-up", "time ratio", "IQR")
"""Heads of the columns that `timing_cells` fills."""


def timing_cells(variant: Mapping[str, Any]) -> tuple[str, ...]:
    """Time and time ratio of one variant as `Timings.to_dict` has it, under `TIMING_HEAD`."""
    seconds, ratio = variant["seconds"], variant["time_ratio"]
    return (
        f"{seconds['median']:.4g}",
        f"{seconds['iqr'][0]:.4g}-{seconds['iqr'][1]:.4g}",
        f"{variant['speedup']:.2f}",
        f"{ratio['median']:.3f}",
        f"{ratio['iqr'][0]:.3f}-{ratio['iqr'][1]:.3f}",
    )


def conditions(results: Mapping[str, Any]) -> str:
    """What results were measured on: processor or GPU, dtype, batch and torch."""
    machine, settings = results["machine"], results["settings"]
    return f"{where(machine)}, {settings['dtype']}, batch {settings['batch']}, torch {machine['versions']['torch']}"


def rounds_of(entry: Mapping[str, Any]) -> str:
    """How many rounds a result has, and whether it is complete."""
    return f"{entry['rounds']} rounds{'' if entry['complete'] else ', incomplete'}"
