"""Natural order, shares of folders, and which picture belongs to which."""

import random
from collections import Counter

import pytest

from diffattn.data.matching import check_turns, match
from diffattn.data.order import natural_order, stratified


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png", "2.png", "10.png", "11.png"],
        ["a1b2.png", "a1b10.png", "a2b1.png", "a10.png"],
        ["2/1.png", "2/10.png", "10/2.png"],
        ["a/2.png", "a b/1.png", "ab/1.png"],
        ["cat.png", "dog.png"],
        ["9" * 5000, "1" + "0" * 5000],  # more digits than Python converts
    ],
)
def test_natural_order(names: list[str]) -> None:
    shuffled = random.Random(0).sample(names, len(names))
    assert natural_order(shuffled) == names


def test_every_folder_has_its_share() -> None:
    names = [f"{animal}/{i}.png" for animal in ("ant", "bee", "cat") for i in range(40)] + ["dog/0.png"]
    for spread in (False, True):
        chosen = stratified(names, 30, spread)
        assert len(chosen) == len(set(chosen)) == 30
        counts = Counter(names[i].split("/")[0] for i in chosen)
        assert all(9 <= counts[animal] <= 10 for animal in ("ant", "bee", "cat"))
        assert chosen == stratified(names, 30, spread)
    assert stratified(names, 3) == [0, 40, 80]
    assert stratified(names, 500) == list(range(121))


def test_the_first_of_one_folder_or_from_all_over_it() -> None:
    names = [f"{i}.png" for i in range(5000)]
    assert stratified(names, 4) == [0, 1, 2, 3]
    chosen = stratified(names, 500, spread=True)
    tenths = Counter(i // 500 for i in chosen)
    assert all(48 <= tenths[i] <= 52 for i in range(10))
    drawn_in_turn = Counter(i % 10 for i in chosen)  # picture i has class i modulo 10: equal steps meet one class
    assert all(40 <= drawn_in_turn[i] <= 60 for i in range(10))


PAIRS = {
    "the same names": (["a/0.png", "b/0.png"], ["a/0.png", "b/0.png"], [0, 1], "name"),
    "other endings": (["a/0.png", "b/0.png"], ["a/0.jpg", "b/0.webp"], [0, 1], "name"),
    "other folders": (["cat.png", "dog.png"], ["x/cat.png", "y/dog.png"], [0, 1], "name"),
    "other order": (["x/b.png", "y/a.png"], ["a.png", "b.png"], [1, 0], "name"),
    "leading zeros": (["0.png", "1.png", "2.png", "10.png"], ["00000.png", "00001.png", "00002.png", "00010.png"],
                      [0, 1, 2, 3], "number"),
    "mixed zeros": (["1.png", "2.png"], ["002.png", "1.png"], [1, 0], "number"),
    "a prefix and a suffix": (["1.png", "2.png"], ["run7_00001_.png", "run7_00002_.png"], [0, 1], "number"),
    "words in between": (["0.png", "1.png"], ["1-a-cat.png", "0-two-dogs.png"], [1, 0], "number"),
    "numbers out of order": (["3.png", "12.png"], ["b_3.png", "a_12.png"], [0, 1], "number"),
    "two numbers": (["0_0.png", "0_1.png", "1_0.png"], ["c0-n00.png", "c1-n00.png", "c0-n01.png"], [0, 2, 1], "number"),
    "one of two numbers": (["0.png", "1.png"], ["s0_seed90.png", "s1_seed50.png"], [0, 1], "number"),
    "nothing in common": (["a cat.png", "a dog.png"], ["x.png", "y.png"], [0, 1], "order"),
    "no numbers on one side": (["0.png", "1.png"], ["cat.png", "dog.png"], [0, 1], "order"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str) -> None:
    first, second, partners, how = PAIRS[case]
    found = match(first, second)
    assert (list(found.partners), found.how) == (partners, how)
    assert str(found) == f"{len(first)} pairs by {how}"
    back = match(second, first)
    assert [back.partners[partner] for partner in partners] == list(range(len(first)))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["0.png", "1.png"], ["1.png", "2.png"], "'0.png' without a partner; '2.png' without a partner"),
        (["0.png", "1.png", "3.png"], ["0.png", "1.png"], "got 3 and 2; they do not pair: '3.png' without"),
        (["0.png", "1.png", "2.png"], ["000.png", "001.png"], "got 3 and 2; they do not pair: '2.png' without"),
        (["cat.png", "dog.png"], ["cat.jpg", "emu.jpg"], "'dog.png' without a partner; 'emu.jpg' without a partner"),
        (["0.png", "1.png"], ["0_1.png", "1_0.png"], "pair by number in 2 ways"),
        (["a.png", "b.png"], ["x.png"], "got 2 and 1; they do not pair: 'b.png' without a partner"),
    ],
)
def test_what_does_not_pair_is_named(first: list[str], second: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(first, second)


def test_places_pair_with_numbers_that_begin_elsewhere() -> None:
    """The pictures of an array, or those that a pipeline will draw, have no names of their own."""
    places = ["0000000.png", "0000001.png", "0000002.png"]
    assert match(places, ["1.png", "2.png", "3.png"], places=True).how == "order"
    assert match(places, ["0.png", "1.png", "2.png"], places=True).how == "number"
    assert match(places, ["cat.png", "dog.png", "emu.png"], places=True).how == "order"
    assert match(["arr_0[0]", "arr_0[1]"], ["5.png", "6.png"], places=True).how == "order"
    with pytest.raises(ValueError, match=r"'0000001.png' without a partner; '3.png' without a partner"):
        match(places, ["0.png", "2.png", "3.png"], places=True)


def test_prompts_of_pictures_with_a_gap_in_their_numbers_are_unclear() -> None:
    names = ["0.png", "1.png", "3.png"]
    with pytest.raises(ValueError, match=r"numbered from 0 to 3 without '2', so which of the 4 prompts"):
        check_turns(names, 4)
    with pytest.raises(ValueError, match="numbered from 1 to 4 without '2'"):
        check_turns(["x1.png", "x3.png", "x4.png"], 5)
    check_turns(names, 3)  # no reading by number gives each a prompt
    check_turns(["1.png", "2.png", "3.png"], 7)
    check_turns(["cat.png", "dog.png"], 7)
    check_turns([f"{i}_{7 * i}.png" for i in range(3)], 5)
    check_turns(["9" * 40 + ".png", "1" * 40 + ".png"], 5)
