"""Checks of the classes of a data set: their balance, and whether they match those of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.data.datasets import LabelledDataset
from diffattn.data.naming import few


@dataclass(frozen=True)
class ClassBalance:
    """How many samples each class has."""

    counts: Mapping[str, int]
    """In the order of the class ids."""

    @property
    def smallest(self) -> int:
        return min(self.counts.values())

    @property
    def largest(self) -> int:
        return max(self.counts.values())

    @property
    def exact(self) -> bool:
        """Whether every class has the same number of samples."""
        return self.smallest == self.largest

    def lines(self) -> list[str]:
        """Human-readable lines: the total and, if they differ, the classes with the fewest and the most samples."""
        total, classes = sum(self.counts.values()), len(self.counts)
        first = f"{total} picture{'s' * (total != 1)} in {classes} class{'es' * (classes != 1)}"
        if self.exact:
            return [f"{first}, {self.smallest} in each" if classes > 1 else first]
        least = few([name for name, n in self.counts.items() if n == self.smallest], 3)
        most = few([name for name, n in self.counts.items() if n == self.largest], 3)
        return [f"{first}, from {self.smallest} ({least}) to {self.largest} ({most})"]

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "smallest": self.smallest, "largest": self.largest, "exact": self.exact}

    def __str__(self) -> str:
        return "\n".join(self.lines())


def check_balance(dataset: LabelledDataset) -> ClassBalance:
    """The number of samples of every class.

    Raises:
        ValueError: there are classes without samples; the message names them.
    """
    counts = dataset.class_counts()
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(f"classes without pictures: {few(empty)}; add pictures or take the classes out")
    return ClassBalance(counts)


def check_classes(class_names: Sequence[str], model_class_names: Sequence[str]) -> None:
    """Check that class ids mean the same in the data and in a model.

    Args:
        class_names: names of the data's classes, in the order of their ids.
        model_class_names: the same of the model or checkpoint.

    Raises:
        ValueError: they differ; the message names the classes that are missing from the data, those that the model does
            not have, or some whose ids differ.
    """
    data, model = list(class_names), list(model_class_names)
    if data == model:
        return
    missing = [name for name in model if name not in set(data)]
    extra = [name for name in data if name not in set(model)]
    found = []
    if missing:
        found.append(f"missing in the data: {few(missing)}")
    if extra:
        found.append(f"unknown to the model: {few(extra)}")
    if not found:
        moved = [name for name in dict.fromkeys(data) if data.index(name) != model.index(name)]
        found.append(f"the ids differ, for example of {few(moved, 3)}")
    raise ValueError(f"the classes of the data do not match those of the model; {'; '.join(found)}")
