"""Which pictures a folder or zip holds, and their classes.

Layouts, by the index file that is there:
    `dataset.json`                        StyleGAN and EDM: {"labels": [[file, class id], …]}, or null for no labels
    `metadata.jsonl` or `metadata.csv`    Hugging Face imagefolder: a `file_name` and further columns for each picture
    none                                  a folder for each class, with pictures at any depth
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.data.choosing import SPLITS, Place, choose
from diffattn.data.decoding import COMMON, ending_of, left_out, picture_endings
from diffattn.data.files import Files
from diffattn.data.indexes import INDEXES, read_index
from diffattn.data.naming import few, plural

__all__ = ["SPLITS", "UNLABELLED", "Listing", "class_ids", "few", "is_picture", "picture_rows", "read_listing"]

UNLABELLED = "all"
"""The one class of pictures without labels."""

MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set: rows of `Files.names`, ascending, and the class id of each."""

    rows: Sequence[int]
    ids: Sequence[int]
    class_names: tuple[str, ...]
    base: str = ""
    """The folder that was chosen, with a slash at its end; empty for the whole."""
    left_out: tuple[str, ...] = ()
    """Files that may be pictures, of kinds that cannot be opened."""
    notes: tuple[str, ...] = ()
    """Human-readable lines about files that are not used."""


def read_listing(files: Files, split: str = "train", label: str | None = None) -> Listing:
    """Find the layout and read it.

    Args:
        files: of the data set.
        split: where the pictures lie in folders such as train, val and test: the one to take. Otherwise "train", which
            takes everything.
        label: the column of the metadata that holds the class; None takes `label` if there is such a column, and one
            class for all if not.

    Raises:
        ValueError: no pictures; no such split or column; folders that can be read in two ways; labels that are
            incomplete, malformed, contradictory, or of files that are not there.
    """
    everything = picture_rows(files)
    place = choose(files, [files.names[row] for row in everything], split)
    rows = [row for row in everything if place.holds(files.names[row])]
    known = set(files.names)
    index = next((at + name for at in place.around for name in INDEXES if at + name in known), None)
    found = _class_folders(files, rows, place, label) if index is None else _by_index(files, rows, place, index, label)
    inside = [name for name in files.names if place.holds(name)]
    return Listing(
        found.rows, found.ids, found.class_names, place.base, left_out(inside), _notes(files, rows, place, inside)
    )


def is_picture(name: str) -> bool:
    """Whether a file can be opened as a picture, by the ending of its name."""
    return ending_of(name) in picture_endings()


def picture_rows(files: Files) -> list[int]:
    """Which of the files are pictures, by the endings of their names.

    Raises:
        ValueError: none; the message says which files there are.
    """
    endings = picture_endings()
    rows = [row for row, name in enumerate(files.names) if ending_of(name) in endings]
    if not rows:
        others = f"; there are {plural(len(files.names), 'file')} of other kinds: {few(files.names)}"
        raise ValueError(
            f"no pictures in {files.where!r}; looked for {', '.join(COMMON)} and what else Pillow opens"
            + (others if files.names else "")
        )
    return rows


def _notes(files: Files, rows: Sequence[int], place: Place, inside: Sequence[str]) -> tuple[str, ...]:
    """Human-readable lines about files that are not used."""
    found = []
    for folder in place.unused:
        count = sum(name.startswith(folder) and is_picture(name) for name in files.names)
        found.append(f"not used: {folder}, {plural(count, 'picture')}")
    used = {files.names[row] for row in rows}
    others = [name for name in inside if name not in used and name.rpartition("/")[2] not in INDEXES]
    if others:
        found.append(f"not used: {plural(len(others), 'file')} of other kinds: {few(others)}")
    if files.repeated:
        found.append(f"not followed: {plural(len(files.repeated), 'link')}, since each file counts once: "
                     + few(files.repeated))  # fmt: skip
    return tuple(found)


def _unlabelled(rows: Sequence[int]) -> Listing:
    return Listing(rows, [0] * len(rows), (UNLABELLED,))


def _class_folders(files: Files, rows: Sequence[int], place: Place, label: str | None) -> Listing:
    """The class is the first folder below the base; a folder without pictures is an empty class."""
    base = place.base
    if label is not None:
        raise ValueError(f"label={label!r} needs a metadata.jsonl with such a column, and {files.where!r} has none")
    inside = [files.names[row].removeprefix(base) for row in rows]
    loose = [name for name in inside if "/" not in name]
    if len(loose) == len(inside):
        return _unlabelled(rows)
    if loose:
        raise ValueError(f"pictures outside of the class folders of {files.where!r}: {few(loose)}")
    _check_no_index_inside(files, base)
    folders = {name.removeprefix(base).split("/")[0] for name in files.folders if name.startswith(base)}
    names = tuple(sorted(folders - {""}))
    ids = {name: i for i, name in enumerate(names)}
    return Listing(rows, [ids[name.split("/")[0]] for name in inside], names)


def _check_no_index_inside(files: Files, base: str) -> None:
    """Refuse folders that have labels of their own and would be mistaken for classes."""
    below = [name for name in files.names if name.startswith(base) and name.rpartition("/")[2] in INDEXES]
    if below := [name for name in below if name.removeprefix(base).count("/") == 1]:
        raise ValueError(
            f"{files.where!r} can be read in two ways: its folders may be classes, or contain labels of their own in "
            f"{few(below)}; name one of the folders as the source, or remove these files"
        )


def _by_index(files: Files, rows: Sequence[int], place: Place, index: str, label: str | None) -> Listing:
    try:
        entries = read_index(index, files.read(files.names.index(index)), label)
        return _unlabelled(rows) if entries is None else _indexed(files, rows, place.base, index, entries)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index!r} in {files.where!r}: {error}") from None


def _indexed(files: Files, rows: Sequence[int], base: str, index: str, entries: Mapping[str, Any]) -> Listing:
    """The pictures that an index names: all of them must exist, and all existing ones must be named."""
    at = index[: index.rfind("/") + 1]
    named = {at + name: value for name, value in entries.items()}
    named = {name: value for name, value in named.items() if name.startswith(base)}
    names = [files.names[row] for row in rows]
    if absent := sorted(named.keys() - set(names)):
        unopened = "; files of these kinds cannot be opened" if set(absent) <= set(files.names) else ""
        raise ValueError(f"it names pictures that do not exist: {few(absent)}{unopened}")
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
    """Class ids of labels, and the names of the classes.

    Whole numbers are the ids, and the names are the same numbers as text; texts are numbered in ascending order.

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
