"""Sheets of labelled pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffattn.drawing.sheet import amplified, comparison_sheet


def block(color: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_picture_is_there_in_order() -> None:
    colors = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
    rows = [(f"row {i}", [block(c) for c in line]) for i, line in enumerate(colors)]
    sheet = comparison_sheet(rows, ["one", "two words here", "three"])
    found = {}
    for color in (c for line in colors for c in line):
        mask = (np.asarray(sheet) == np.asarray(block(color))[0, 0]).all(axis=-1)
        left, top, right, bottom = Image.fromarray(mask).getbbox()  # type: ignore[misc]
        assert (right - left, bottom - top) == (64, 48), color
        found[color] = (left, top)
    for line in colors:
        assert len({found[c][1] for c in line}) == 1  # on one height
        assert [found[c][0] for c in line] == sorted(found[c][0] for c in line)
    assert all(found[a][0] == found[b][0] and found[a][1] < found[b][1] for a, b in zip(*colors, strict=True))


def test_labels_are_drawn_left_and_above() -> None:
    blank = comparison_sheet([("", [block("white")])], [""])
    for rows, columns in (([("a label", [block("white")])], [""]), ([("", [block("white")])], ["a label"])):
        assert comparison_sheet(rows, columns).tobytes() != blank.tobytes()


def test_long_labels_make_room_for_themselves() -> None:
    short = comparison_sheet([("row", [block("red")])], ["unicorn"])
    long = comparison_sheet([("row", [block("red")])], ["a unicorn with a very long name and a longer one"])
    assert long.height > short.height
    assert long.width == short.width


def test_bad_sheets() -> None:
    with pytest.raises(ValueError, match="2 pictures for 1 columns"):
        comparison_sheet([("row", [block("red"), block("red")])], ["one"])
    with pytest.raises(ValueError, match="one size"):
        comparison_sheet([("row", [block("red"), block("red", (8, 8))])], ["one", "two"])
    with pytest.raises(ValueError, match="one size"):
        comparison_sheet([], [])


@pytest.mark.parametrize(("most", "factor"), [(0.0, 1), (0.009, 100), (0.019, 50), (0.09, 10), (0.6, 1), (1.0, 1)])
def test_a_difference_is_amplified_by_a_round_factor(most: float, factor: int) -> None:
    a = torch.full((2, 3, 8, 8), most)
    a[:, :, :4] /= 2
    shown, found = amplified(a, torch.zeros_like(a))
    assert found == factor
    torch.testing.assert_close(shown, factor * a)
    torch.testing.assert_close(amplified(torch.zeros_like(a), a)[0], shown)


def test_a_few_large_differences_do_not_keep_the_rest_dark() -> None:
    a = torch.full((1, 3, 64, 64), 0.01)
    a[0, 0, 0, :20] = 1
    shown, factor = amplified(a, torch.zeros_like(a))
    assert (factor, shown.max().item()) == (100, 1)
    alone = torch.zeros_like(a)
    alone[0, 0, 0, 0] = 0.19
    assert amplified(alone, torch.zeros_like(a))[1] == 5
