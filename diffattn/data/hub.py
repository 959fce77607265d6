"""Data sets of the Hugging Face hub, read with the `datasets` library, which is optional."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from diffattn.data.layouts import UNLABELLED, Listing, class_ids

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(source: str) -> bool:
    """Whether a text could be the `owner/name` of a data set."""
    return _NAME.fullmatch(source) is not None and not source.lower().endswith(".zip")


class HubFiles:
    """The pictures of a table of the `datasets` library, still encoded."""

    def __init__(self, where: str, table: Any, column: str) -> None:
        """
        Args:
            where: name of the data set in messages.
            table: a `datasets.Dataset`.
            column: the one that holds the pictures.
        """
        library = import_module("datasets")
        self.where = where
        self.pictures = table.select_columns([column]).cast_column(column, library.Image(decode=False))
        self.column, self.version = column, str(table._fingerprint)
        self.names: tuple[str, ...] = tuple(f"row {row}" for row in range(len(table)))
        self.folders: tuple[str, ...] = ()
        self.repeated: tuple[str, ...] = ()

    def read(self, row: int) -> bytes:
        picture = self.pictures[row][self.column]
        if picture is None:
            raise ValueError("there is no picture in this row")
        if picture["bytes"] is not None:
            return picture["bytes"]
        return Path(picture["path"]).read_bytes()

    def signatures(self, rows: Tensor) -> list[str]:
        return [self.version] * len(rows)


def open_hub(name: str, split: str, label: str | None) -> tuple[HubFiles, Listing]:
    """Open a data set by its `owner/name`; it is downloaded to the library's cache if necessary.

    Args:
        name: of the data set.
        split: which of its splits to take.
        label: the column that holds the class; None takes the first `ClassLabel` column, and one class for all if there
            is none.

    Raises:
        ValueError: `datasets` is not installed, or it cannot find the data set, the split, a picture or the column.
    """
    try:
        library = import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{name!r} is not a folder or zip here; to load it as a Hugging Face data set, pip install datasets"
        ) from None
    try:
        table = library.load_dataset(name, split=split)
    except Exception as error:  # the hub, the network and the builders have no common class of errors
        raise ValueError(f"cannot load the Hugging Face data set {name!r}, split {split!r}: {error}") from error
    return from_table(name, table, label)


def from_table(name: str, table: Any, label: str | None) -> tuple[HubFiles, Listing]:
    """The pictures and labels of a `datasets.Dataset`, see `open_hub`."""
    library = import_module("datasets")
    features = table.features
    columns = [column for column, kind in features.items() if isinstance(kind, library.Image)]
    if not columns:
        raise ValueError(f"{name!r} has no column of pictures; its columns are {', '.join(features)}")
    if label is None:
        label = next((c for c, kind in features.items() if isinstance(kind, library.ClassLabel)), None)
    elif label not in features:
        raise ValueError(f"{name!r} has no column {label!r}; there are: {', '.join(features)}")
    files, rows = HubFiles(name, table, columns[0]), range(len(table))
    if label is None:
        return files, Listing(rows, [0] * len(table), (UNLABELLED,))
    values = table[label][:]
    try:
        ids, names = class_ids(values)
    except ValueError as error:
        raise ValueError(f"column {label!r} of {name!r}: {error}") from None
    kind = features[label]
    return files, Listing(rows, ids, tuple(kind.names) if isinstance(kind, library.ClassLabel) else names)
