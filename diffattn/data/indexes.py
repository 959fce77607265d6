"""The files that say which class each picture has: `dataset.json`, `metadata.jsonl` and `metadata.csv`."""

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffattn.data.naming import few
from diffattn.files import decode_text, read_text, split_lines

INDEXES = ("dataset.json", "metadata.jsonl", "metadata.csv")
"""In the order in which they are looked for."""


def read_index(name: str, data: bytes, label: str | None) -> Mapping[str, Any] | None:
    """The labels that an index gives the pictures.

    Args:
        name: of the index, which decides its layout.
        data: its content.
        label: the column of metadata that holds the class; None takes `label` if there is such a column.

    Returns:
        Path from the index's folder -> label, None where there is no label for this picture; or None if the index has
        no labels at all.

    Raises:
        ValueError: not of this layout, with the line where there is one; no such column; a picture with two labels.
    """
    text = decode_text(data)
    if name.endswith(".json"):
        return _read_json(text, label)
    return _read_metadata(_rows_of_csv(text) if name.endswith(".csv") else rows_of_jsonl(text), label)


def _read_json(text: str, label: str | None) -> Mapping[str, Any] | None:
    if label is not None:
        raise ValueError(f"label={label!r} chooses a column of a metadata.jsonl; this layout has none")
    content = read_text(text)
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError('it must hold {"labels": [[file, class id], …]}')
    pairs = content["labels"]
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError('"labels" must be a list of [file, class id]')
    return _each_once((str(name), value) for name, value in pairs)


def _read_metadata(rows: Sequence[Any], label: str | None) -> Mapping[str, Any] | None:
    columns: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            held = (
                f"its columns are {', '.join(map(str, row))}" if isinstance(row, dict) else f"it contains {row!r:.40}"
            )
            raise ValueError(f"every line must have a file_name; entry {number} has none, {held}")
        columns |= dict.fromkeys(row)
    column = label or "label"
    if column not in columns:
        if label is None:
            return None
        raise ValueError(f"no column {column!r}; there are: {', '.join(sorted(columns.keys() - {'file_name'}))}")
    return _each_once((row["file_name"], row.get(column)) for row in rows)


def rows_of_jsonl(text: str) -> list[Any]:
    """The values in a JSON Lines text, empty lines left out.

    Raises:
        ValueError: a line that is not JSON; the message names it, counted from 1.
    """
    rows = []
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                rows.append(read_text(line))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
    return rows


def _rows_of_csv(text: str) -> list[Any]:
    """The rows below the header; values may hold line ends within quotation marks."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.removeprefix("\ufeff") for name in reader.fieldnames or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"duplicate columns: {few(twice)}")
        reader.fieldnames = names
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"near line {reader.line_num} it is not CSV: {error}") from None
    if any(None in row for row in rows):
        raise ValueError(f"a row has more values than the header has columns, which are {', '.join(names)}")
    return rows


def _each_once(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The labels by normalised path. Naming a picture again with the same label is a warning, with another an error."""
    found: dict[str, Any] = {}
    again: dict[str, None] = {}
    for name, value in entries:
        path = name.replace("\\", "/").removeprefix("./")
        if path not in found:
            found[path] = value
        elif type(found[path]) is type(value) and found[path] == value:
            again[path] = None
        else:
            raise ValueError(f"it names the picture {path!r} twice, with the labels {found[path]!r} and {value!r}")
    if again:
        warnings.warn(f"pictures that are named more than once, with the same label: {few(tuple(again))}", stacklevel=2)
    return found
