"""Class names and ids of a pipeline.

One rule holds wherever a class is named, in Python, on the command line and on the page: a whole number (int) is an id;
text is a name if some class has it, and an id if it consists of digits and no class has it as a name.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from operator import index
from typing import Any

SHOWN = 20
"""An error lists all names up to this many."""


MAX_DIGITS = 20  # of an id in text


class ClassNames:
    """The names of a model's classes.

    Args:
        id2label: class id -> its names, separated by commas; ids are numbers, or text as in JSON. None: the classes
            have no names.
        num_classes: ids run from 0 to this number minus 1.

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
        """Name -> id in ascending order of the names, without names that several classes share."""
        return {name: ids[0] for name, ids in sorted(self._ids.items()) if len(ids) == 1}

    def ids(self, labels: Any) -> list[int]:
        """Class ids of an id, a name, or a list of both.

        Args:
            labels: an int is an id. Text is a name, or several names of one class separated by commas; digits that are
                not a name are an id. A name wins: where the classes are called "0", "1", "10", "2", the text "2" is
                the last of them, with the id 3, and the int 2 is the class "10".

        Raises:
            ValueError: no label at all; an unknown or ambiguous name; an id out of range; digits that are not a name
                where all names are digits.
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
            found = None
        if found is None or isinstance(label, bool):
            raise TypeError(f"a class label is an id (int) or a name (str), got {label!r}")
        self._check_id(found)
        return found

    def _id_of_name(self, name: str) -> int:
        text = name.strip()
        ids = self._ids.get(text) or self._common_ids(text)
        if len(ids) == 1:
            return ids[0]
        if len(ids) > 1:
            raise ValueError(f"the class name {name!r} has several ids: {ids}; give the id, or another name")
        if _is_number(text):
            return self._id_of_digits(text)
        raise ValueError(f"unknown class name {name!r}; {self._known(name)}, or an id from {self._range}")

    def _common_ids(self, text: str) -> list[int]:
        """The classes that have all the names in a text such as "Tinca tinca, tench"."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) < 2 or not all(parts):
            return []
        return sorted(set.intersection(*(set(self._ids.get(part, ())) for part in parts)))

    def _id_of_digits(self, digits: str) -> int:
        """The id given by digits that are not a name."""
        bare = digits.lstrip("0") or "0"
        if len(bare) > MAX_DIGITS or int(bare) >= self.num_classes:
            raise ValueError(f"class ids are from {self._range}, got {digits[: 2 * MAX_DIGITS]}; {self._known(digits)}")
        if self._ids and all(map(_is_number, self._ids)):
            called = (self.id2label or {}).get(int(bare), "")
            raise ValueError(
                f"{digits!r} is ambiguous: the classes have numbers as names, and none is called {digits!r}; as an id "
                f"it would be the class {called!r}; {self._known(digits)}"
            )
        return int(bare)

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
    if isinstance(labels, str | bytes):
        return False
    return isinstance(labels, Sequence) or getattr(labels, "ndim", 0) > 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
