"""Text tables of measurements, and the line that says where they were made: shared by all reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffattn.machine import where

TIMING_HEAD = ("seconds", "IQR", "speed-up", "time ratio", "IQR")
"""Heads of the columns that `timing_cells` fills."""


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; a column without a single entry is left out.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as there are columns.

    Raises:
        ValueError: a row of another length than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the head {len(head)}: {list(row)}")
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in used]
    return "\n".join(
        "  ".join(line[i].ljust(width) for i, width in zip(used, widths, strict=True)).rstrip() for line in lines
    )


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
