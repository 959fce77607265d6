"""Class names to ids."""

from typing import Any

import numpy as np
import pytest
import torch

from diffattn.sampling.labels import ClassNames

NAMES = {0: "cat, tabby", 1: "dog", 2: "crane, bird", 3: "crane, machine"}


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (2, [2]),
        ("tabby", [0]),
        (" dog ", [1]),
        ("cat, tabby", [0]),
        (["dog", 3, "cat"], [1, 3, 0]),
        (("dog",), [1]),
        (range(2), [0, 1]),
        (np.int64(3), [3]),
        (np.array([1, 0]), [1, 0]),
        (torch.tensor([3, 3]), [3, 3]),
        (torch.tensor(1), [1]),
        ("3", [3]),
        (["03", "dog", " 2 "], [3, 1, 2]),
        ("bird, crane", [2]),
        ("machine,crane", [3]),
    ],
)
def test_labels(labels: Any, ids: list[int]) -> None:
    assert ClassNames(NAMES, 4).ids(labels) == ids


def test_names_that_stand_for_one_class() -> None:
    names = ClassNames({"1": "dog", "0": "cat, tabby", "2": "dog, hound"}, 3)
    assert names.labels == {"cat": 0, "cat, tabby": 0, "dog, hound": 2, "hound": 2, "tabby": 0}
    assert names.id2label == {1: "dog", 0: "cat, tabby", 2: "dog, hound"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (4, "class ids are from 0 to 3, got 4"),
        (-1, "class ids are from 0 to 3, got -1"),
        ([], "class_labels is empty"),
        ("crane", r"'crane' has several ids: \[2, 3\]; give the id"),
        ("cow", "unknown class name 'cow'; names are bird, cat, .*, tabby, or an id from 0 to 3"),
        ("", "unknown class name ''"),
        ("4", "class ids are from 0 to 3, got 4; names are bird"),
        ("9" * 5000, "class ids are from 0 to 3, got 999"),
        ("-1", "unknown class name '-1'"),
        ("٣", "unknown class name"),  # a digit of another script
        ("cat, dog", "unknown class name 'cat, dog'"),
        ("crane, crane", r"'crane, crane' has several ids: \[2, 3\]"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNames(NAMES, 4).ids(labels)


@pytest.mark.parametrize("label", [1.0, None, {"dog": 1}, True, b"dog"])
def test_neither_id_nor_name(label: Any) -> None:
    with pytest.raises(TypeError, match="a class label is an id"):
        ClassNames(NAMES, 4).ids([label])


def test_of_many_names_the_closest_are_shown() -> None:
    names = ClassNames({i: f"animal {i}" for i in range(50)} | {50: "hedgehog"}, 51)
    with pytest.raises(ValueError, match=r"51 names are in pipe.labels, the closest hedgehog, or an id from 0 to 50"):
        names.ids("hegdehog")


def test_without_names() -> None:
    names = ClassNames(None, 4)
    assert (names.id2label, names.labels) == (None, {})
    assert names.ids(3) == [3]
    with pytest.raises(ValueError, match="this model's classes have no names, or an id from 0 to 3"):
        names.ids("dog")


def test_a_name_for_a_class_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="class ids are from 0 to 3, got 4"):
        ClassNames({4: "cow"}, 4)


# Names that are numbers, as class folders often are: their order is that of text, "0", "1", "10", "11", "2", …

FOLDERS = sorted(str(i) for i in range(12))


def test_a_name_wins_over_an_id_and_an_int_is_an_id() -> None:
    names = ClassNames(dict(enumerate(FOLDERS)), 12)
    for name in FOLDERS:
        assert names.ids(name) == [FOLDERS.index(name)]
        assert names.ids([name, names.labels[name]]) == [FOLDERS.index(name)] * 2
    assert FOLDERS[names.ids("2")[0]] == "2"
    assert FOLDERS[names.ids(2)[0]] == "10"


def test_digits_that_are_no_name_are_ambiguous_where_names_are_numbers() -> None:
    names = ClassNames({0: "1", 1: "10", 2: "2"}, 3)
    with pytest.raises(
        ValueError, match=r"'0' is ambiguous: .* as an id it would be the class '1'; names are 1, 10, 2"
    ):
        names.ids("0")
    with pytest.raises(ValueError, match="'02' is ambiguous"):
        names.ids("02")
    assert names.ids(0) == [0]


def test_digits_that_are_no_name_are_an_id_where_names_are_words() -> None:
    names = ClassNames({0: "cat", 1: "2", 2: "dog"}, 3)
    assert names.ids(["0", "2", 2]) == [0, 1, 2]
    assert ClassNames(None, 3).ids("2") == [2]


def test_a_number_that_several_classes_are_called_is_no_id() -> None:
    with pytest.raises(ValueError, match=r"'1' has several ids: \[0, 2\]; give the id"):
        ClassNames({0: "1, one", 1: "two", 2: "1, uno"}, 3).ids("1")
