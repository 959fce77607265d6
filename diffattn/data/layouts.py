"""Which pictures a folder or zip holds and of which classes: the three layouts and their splits.

Layouts, by the index file that is there:
    `dataset.json`                        StyleGAN and EDM: {"labels": [[file, class id], …]}, or null for no labels
    `metadata.jsonl` or `metadata.csv`    Hugging Face imagefolder: a `file_name` and further columns for each picture
    none                                  a folder for each class, with pictures at any depth
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.data.decoding import EXTENSIONS
from diffattn.data.files import Files

UNLABELLED = "all"
"""The one class of pictures without labels."""

SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Folder names that stand for a part of the data, and the name of that part."""

MAX_CLASSES = 1_000_000
_INDEXES = ("dataset.json", "metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set: rows of `Files.names`, ascending, and the class id of each."""

    rows: Sequence[int]
    ids: Sequence[int]
    class_names: tuple[str, ...]


def read_listing(files: Files, split: str = "train", label: str | None = None, look_through: bool = False) -> Listing:
    """Find the layout and read it.

    Args:
        files: of the data set.
        split: where all pictures lie in folders such as train, val and test: the one to take. Otherwise "train",
            which takes everything.
        label: the column of the metadata that holds the class; None takes `label` if there is such a column, and one
            class for all if not.
        look_through: if everything lies in one folder and that holds only folders or an index, start there. For zips.

    Raises:
        ValueError: no pictures, no such split or column, or labels that are incomplete, malformed, or of files that
            are not there.
    """
    wrapper = _wrapper(files) if look_through else ""
    base = wrapper + _split_folder(files, wrapper, split)
    rows = [row for row, name in enumerate(files.names) if name.startswith(base) and is_picture(name)]
    if not rows:
        raise ValueError(f"no pictures in {files.where!r}; looked for {', '.join(sorted(EXTENSIONS))}")
    known = set(files.names)
    index = next((at + name for at in dict.fromkeys((base, wrapper)) for name in _INDEXES if at + name in known), None)
    if index is None:
        return _class_folders(files, rows, base, label)
    try:
        text = files.read(files.names.index(index)).decode("utf-8-sig")
        entries = _read_json(text, label) if index.endswith(".json") else _read_metadata(index, text, label)
        return _unlabelled(rows) if entries is None else _indexed(files, rows, base, index, entries)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index!r} in {files.where!r}: {error}") from None


def is_picture(name: str) -> bool:
    """Whether a file name ends as a picture's does."""
    dot = name.rfind(".")
    return dot >= 0 and name[dot:].lower() in EXTENSIONS


def _unlabelled(rows: Sequence[int]) -> Listing:
    return Listing(rows, [0] * len(rows), (UNLABELLED,))


def _wrapper(files: Files) -> str:
    """The folder around everything, with its slash, or nothing."""
    tops = {name.split("/")[0] for name in files.names}
    if len(tops) != 1 or "" in tops or files.names[0] in tops:
        return ""
    folder = f"{tops.pop()}/"
    inside = [name.removeprefix(folder) for name in files.names]
    if any(name in _INDEXES for name in inside):
        return folder
    return folder if all("/" in name for name in inside if is_picture(name)) else ""


def _split_folder(files: Files, base: str, split: str) -> str:
    """The folder of the split below `base`, with its slash; nothing if the pictures do not lie in splits."""
    inside = (name.removeprefix(base) for name in files.names if name.startswith(base) and is_picture(name))
    tops = {name.split("/")[0] if "/" in name else "" for name in inside}
    if tops and all(top.lower() in SPLITS for top in tops):
        wanted = SPLITS.get(split.lower(), split)
        found = [top for top in sorted(tops) if top == split] or [
            t for t in sorted(tops) if SPLITS[t.lower()] == wanted
        ]
        if not found:
            raise ValueError(f"no split {split!r} in {files.where!r}; there are: {', '.join(sorted(tops))}")
        return found[0] + "/"
    if split != "train":
        raise ValueError(f"{files.where!r} has no splits, so split must be 'train', which is everything; got {split!r}")
    return ""


def _class_folders(files: Files, rows: Sequence[int], base: str, label: str | None) -> Listing:
    """The class is the first folder below `base`; a folder without pictures is an empty class."""
    if label is not None:
        raise ValueError(f"label={label!r} needs a metadata.jsonl with such a column, and {files.where!r} has none")
    inside = [files.names[row].removeprefix(base) for row in rows]
    loose = [name for name in inside if "/" not in name]
    if len(loose) == len(inside):
        return _unlabelled(rows)
    if loose:
        raise ValueError(f"pictures outside of the class folders of {files.where!r}: {few(loose)}")
    folders = {name.removeprefix(base).split("/")[0] for name in files.folders if name.startswith(base)}
    names = tuple(sorted(folders - {""}))
    ids = {name: i for i, name in enumerate(names)}
    return Listing(rows, [ids[name.split("/")[0]] for name in inside], names)


def _read_json(text: str, label: str | None) -> dict[str, Any] | None:
    """File name -> class id of a `dataset.json`; None if it has no labels."""
    if label is not None:
        raise ValueError(f"label={label!r} chooses a column of a metadata.jsonl; this layout has none")
    content = json.loads(text)
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError('it must hold {"labels": [[file, class id], …]}')
    pairs = content["labels"]
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError('"labels" must be a list of [file, class id]')
    return {str(name): value for name, value in pairs}


def _read_metadata(index: str, text: str, label: str | None) -> dict[str, Any] | None:
    """File name -> value of the label column; None if no column is asked for and none is called `label`."""
    if index.endswith(".csv"):
        lines: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    else:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(line, dict) and isinstance(line.get("file_name"), str) for line in lines):
        raise ValueError("every line must have a file_name")
    columns = {column for line in lines for column in line}
    column = label or "label"
    if column not in columns:
        if label is None:
            return None
        raise ValueError(f"no column {column!r}; there are: {', '.join(sorted(columns - {'file_name'}))}")
    return {line["file_name"]: line.get(column) for line in lines}


def _indexed(files: Files, rows: Sequence[int], base: str, index: str, entries: Mapping[str, Any]) -> Listing:
    """The pictures that an index names: all of them must be there, and all that are there must be named."""
    at = index[: index.rfind("/") + 1]
    named = {at + name.replace("\\", "/").removeprefix("./"): value for name, value in entries.items()}
    named = {name: value for name, value in named.items() if name.startswith(base)}
    names = [files.names[row] for row in rows]
    if absent := sorted(named.keys() - set(names)):
        raise ValueError(f"it names pictures that are not there: {few(absent)}")
    if unnamed := [name for name in names if name not in named]:
        raise ValueError(f"it does not name the pictures {few(unnamed)}")
    values = [named[name] for name in names]
    if all(value is None for value in values):
        return _unlabelled(rows)
    if unlabelled := [name for name in names if named[name] is None]:
        raise ValueError(f"it has no label for {few(unlabelled)}")
    ids, class_names = class_ids(values)
    folders = [name.removeprefix(base).rpartition("/")[0] for name in names]
    if isinstance(values[0], int):
        class_names = _names_from_folders(folders, ids) or class_names
    return Listing(rows, ids, class_names)


def class_ids(values: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Class ids of labels, and the classes' names.

    Whole numbers are the ids, and their names the same as text; texts are numbered in ascending order.

    Raises:
        ValueError: neither, a negative number, or one of a million or more.
    """
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        if wrong := [value for value in values if not 0 <= value < MAX_CLASSES]:
            raise ValueError(f"class ids must be from 0 to {MAX_CLASSES - 1}, got {wrong[0]}")
        return numbers, tuple(str(i) for i in range(max(numbers, default=-1) + 1))
    if wrong := [value for value in values if not isinstance(value, str)]:
        odd = next((value for value in wrong if value not in numbers), wrong[0])
        raise ValueError(f"labels must be all whole numbers or all texts, got {odd!r}")
    names = tuple(sorted(set(values)))
    ids = {name: i for i, name in enumerate(names)}
    return [ids[value] for value in values], names


def _names_from_folders(folders: Iterable[str], ids: Sequence[int]) -> tuple[str, ...] | None:
    """The folders in the order of their ids, if each of the ids 0, 1, … has one folder of its own."""
    pairs = set(zip(folders, ids, strict=True))
    by_id = {i: folder for folder, i in pairs}
    one_to_one = len(pairs) == len(by_id) == len({folder for folder, _ in pairs}) == max(by_id) + 1
    return tuple(by_id[i] for i in range(len(by_id))) if one_to_one and "" not in by_id.values() else None


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(repr(name) for name in names[:most]) + (f" and {rest} more" if rest > 0 else "")
