"""Tables for reports: as text in a terminal, and as Markdown."""

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, drop_empty: bool = True) -> str:
    """Columns as wide as their widest cell, two spaces apart.

    Args:
        head: names of the columns.
        rows: cells, one per column in each row.
        drop_empty: omit columns without any entry.

    Raises:
        ValueError: a row whose length differs from the head's.
    """
    _check_lengths(head, rows)
    used = [i for i in range(len(head)) if not drop_empty or any(row[i] for row in rows)]
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in used]
    return "\n".join(
        "  ".join(line[i].ljust(width) for i, width in zip(used, widths, strict=True)).rstrip() for line in lines
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes and line ends in cells are escaped.

    Args:
        head: names of the columns.
        rows: cells, one per column in each row.

    Raises:
        ValueError: a row whose length differs from the head's.
    """
    _check_lengths(head, rows)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def _check_lengths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the head {len(head)}: {list(row)}")
