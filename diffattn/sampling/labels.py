"""Class names and ids of a pipeline."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from operator import index
from typing import Any

SHOWN = 20
"""More names than this are not listed in an error."""


class ClassNames:
    """The names of a model's classes.

    Args:
        id2label: class id -> its names, separated by commas; ids as numbers, or as text, as JSON has them. None: the
            classes have no names.
        num_classes: ids are below it.

    Raises:
        ValueError: an id out of range.
    """

    def __init__(self, id2label: Mapping[Any, str] | None, num_classes: int) -> None:
        self.num_classes = num_classes
        self.id2label = None if id2label is None else {int(key): str(value) for key, value in id2label.items()}
        self._ids: dict[str, list[int]] = {}
        for key, value in (self.id2label or {}).items():
            self._check_id(key)
            for name in {value.strip(), *(part.strip() for part in value.split(","))} - {""}:
                self._ids.setdefault(name, []).append(key)

    @property
    def labels(self) -> dict[str, int]:
        """Name -> id, in the order of the names, without names that several classes share."""
        return {name: ids[0] for name, ids in sorted(self._ids.items()) if len(ids) == 1}

    def ids(self, labels: Any) -> list[int]:
        """Class ids of an id, a name, or a list of both.

        Raises:
            ValueError: no label at all; an unknown or ambiguous name; an id out of range.
            TypeError: something that is neither id nor name.
        """
        found = [self._id(label) for label in (labels if _is_list(labels) else [labels])]
        if not found:
            raise ValueError("class_labels is empty; give at least one class id or name")
        return found

    def _id(self, label: Any) -> int:
        if isinstance(label, str):
            return self._id_of_name(label)
        try:
            found = index(label)
        except TypeError:
            raise TypeError(f"a class label is an id (int) or a name (str), got {label!r}") from None
        self._check_id(found)
        return found

    def _id_of_name(self, name: str) -> int:
        ids = self._ids.get(name.strip(), [])
        if len(ids) > 1:
            raise ValueError(f"the class name {name!r} stands for several ids: {ids}; give the id")
        if not ids:
            raise ValueError(f"unknown class name {name!r}; {self._known(name)}, or an id from {self._range}")
        return ids[0]

    def _known(self, name: str) -> str:
        names = sorted(self._ids)
        if len(names) <= SHOWN:
            return f"names are {', '.join(names)}" if names else "this model's classes have no names"
        near = get_close_matches(name, names, n=3)
        return f"{len(names)} names are in pipe.labels" + (f", the closest {', '.join(near)}" if near else "")

    def _check_id(self, label: int) -> None:
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class ids are from {self._range}, got {label}")

    @property
    def _range(self) -> str:
        return f"0 to {self.num_classes - 1}"


def _is_list(labels: Any) -> bool:
    """Lists, tuples, ranges, and tensors or arrays with a dimension."""
    if isinstance(labels, str):
        return False
    return isinstance(labels, Sequence) or getattr(labels, "ndim", 0) > 0
