"""The worst pairs: which they are, and that the sheet shows them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny, web
from torch import Tensor

from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.evaluation.draw_set import drawn_titles
from diffattn.evaluation.picture_set import Listed, PictureSet
from diffattn.evaluation.worst_pairs import SIDES, WorstPairs
from diffattn.metrics.adm import write_pictures
from diffattn.sampling import SiTPipeline

COUNT = 9


def pictures(count: int = COUNT, size: int = 16) -> Tensor:
    return torch.randint(100, 156, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def changed(exact: Tensor) -> Tensor:
    """Picture i, brightened by 10 times a number: 4 most, then 7, 2, 0, …"""
    by = torch.tensor([4, 1, 5, 2, 8, 3, 0, 7, 1])
    return exact + (10 * by)[:, None, None, None].to(torch.uint8)


ORDER = [4, 7, 2, 0, 5, 3, 1, 8, 6]


def set_of(x: Tensor, name: str = "x") -> PictureSet:
    return PictureSet(Listed(name, tuple(f"{i}.png" for i in range(len(x))), x.__getitem__))


def test_the_worst_come_first_by_the_first_score_that_was_measured() -> None:
    psnr = torch.tensor([30.0, 20.0, torch.inf, 25.0])
    found = WorstPairs.of({"psnr": psnr, "ssim": torch.rand(4)}, 2)
    assert (found.by, found.worst, found.middle) == ("psnr", (1, 3), 0)
    assert [found.figure(i) for i in (1, 2)] == ["PSNR 20.0 dB", "identical"]
    lpips = WorstPairs.of({"psnr": psnr, "lpips": torch.tensor([0.1, 0.2, 0.0, 0.9])}, 3)
    assert (lpips.by, lpips.worst) == ("lpips", (3, 1, 0))
    assert lpips.figure(3) == "LPIPS 0.900"
    dino = WorstPairs.of({"psnr": psnr, "clip_i": psnr, "dino_i": torch.tensor([0.9, 0.5, 1.0, -0.1])}, 2)
    assert (dino.by, dino.worst) == ("dino_i", (3, 1))


def test_a_white_picture_that_is_painted_over_is_not_missed() -> None:
    """It has no foreground PSNR."""
    values = {"psnr": torch.tensor([30.0, 8.0, 40.0]), "foreground_psnr": torch.tensor([25.0, torch.nan, 35.0])}
    found = WorstPairs.of(values, 1)
    assert (found.by, found.worst) == ("foreground_psnr", (1,))


def test_the_details_name_the_pairs() -> None:
    found = WorstPairs.of({"psnr": torch.tensor([torch.inf, 20.0, 25.0, torch.inf])}, 2)
    assert found.details([0, 2, 3, 5], ["a", "b", "c", "d"]) == {
        "by": "psnr",
        "sheet": "worst_pairs.png",
        "worst": [{"number": 2, "title": "b", "psnr": 20.0}, {"number": 3, "title": "c", "psnr": 25.0}],
        "middle": {"number": 0, "title": "a", "psnr": None},
    }


def cells(sheet: Image.Image, rows: int, columns: int, side: int) -> list[list[np.ndarray[Any, Any]]]:
    """The pictures of a sheet, from its lower right corner on."""
    pixels, step = np.asarray(sheet), side + 8
    height, width = pixels.shape[:2]
    tops, lefts = (
        [end - 8 - side - i * step for i in range(count)][::-1] for end, count in ((height, rows), (width, columns))
    )
    return [[pixels[y : y + side, x : x + side] for x in lefts] for y in tops]


def test_the_sheet_shows_partner_picture_and_difference_of_each_row() -> None:
    exact = pictures()
    mine, titles = changed(exact), [f"picture {i}" for i in range(COUNT)]
    psnr = -10 * ((mine.float() - exact.float()) / 255).square().mean(dim=(1, 2, 3)).log10()
    found = WorstPairs.of({"psnr": psnr}, 3)
    assert (list(found.worst), found.middle) == (ORDER[:3], ORDER[COUNT // 2])
    sheet = found.sheet(set_of(mine), set_of(exact), titles, ("exact", "fast"))
    rows = cells(sheet, 4, 3, SIDES[0])
    by = SIDES[0] // 16
    for row, number in zip(rows, [*ORDER[:3], ORDER[4]], strict=True):
        for cell, picture in zip(row, (exact[number], mine[number]), strict=False):
            expected = picture.permute(1, 2, 0).numpy().repeat(by, 0).repeat(by, 1)  # every pixel a square
            np.testing.assert_array_equal(cell, expected)
        change = int(mine[number, 0, 0, 0]) - int(exact[number, 0, 0, 0])
        assert (row[2] == 2 * change).all()  # 80 of 255 is doubled, 5 times would clip
    few = WorstPairs.of({"psnr": psnr}, COUNT).sheet(set_of(mine), set_of(exact), titles, ("exact", "fast"))
    assert len(cells(few, COUNT, 3, SIDES[0])) == COUNT
    assert few.height - sheet.height == (COUNT - 4) * (SIDES[0] + 8)  # the middle one is not there twice


def test_large_pictures_are_made_smaller() -> None:
    exact = pictures(3, 600)
    found = WorstPairs.of({"psnr": torch.tensor([9.0, 8.0, 7.0])}, 1)
    sheet = found.sheet(set_of(exact // 2), set_of(exact), ["a", "b", "c"], ("exact", "fast"))
    assert 3 * SIDES[1] < sheet.width < 3 * SIDES[1] + 400


def test_an_evaluation_of_pairs_writes_the_sheet(tmp_path: Path) -> None:
    exact = pictures()
    write_pictures(tmp_path / "exact.npz", exact)
    write_pictures(tmp_path / "fast.npz", changed(exact))
    given: Any = dict(paired=tmp_path / "exact.npz")
    found = evaluate(tmp_path / "fast.npz", folder=tmp_path / "run", **given)
    assert [pair["number"] for pair in found.details["worst_pairs"]["worst"]] == ORDER[:6]
    assert found.details["worst_pairs"]["middle"]["title"] == f"arr_0[{ORDER[4]}]"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["details"] == found.details
    with Image.open(tmp_path / "run" / "worst_pairs.png") as sheet:
        assert sheet.height > 6 * SIDES[0]
    two = evaluate(tmp_path / "fast.npz", folder=tmp_path / "two", config=EvaluateConfig(worst_pairs=2), **given)
    assert len(two.details["worst_pairs"]["worst"]) == 2
    none = evaluate(tmp_path / "fast.npz", folder=tmp_path / "none", config=EvaluateConfig(worst_pairs=0), **given)
    assert "worst_pairs" not in none.details
    assert not (tmp_path / "none" / "worst_pairs.png").exists()
    assert none.scores == found.scores
    with pytest.raises(ValueError, match="worst pairs must be 0 or more, got -1"):
        EvaluateConfig(worst_pairs=-1)


def test_pictures_are_called_by_prompt_or_class_and_seed(tmp_path: Path) -> None:
    draw = DrawConfig(num_pictures=5, prompts=["a cat", "a dog"], seed=10)
    assert drawn_titles(tiny.pipeline("sd", tmp_path / "words"), draw, [0, 3]) == ["a cat, seed 10", "a dog, seed 13"]
    web.save_sits(tmp_path, "sit")
    pipe: Any = SiTPipeline.from_pretrained(tmp_path / "sit")
    classes = drawn_titles(pipe, DrawConfig(num_pictures=7, guidance=1.0), [1, 6])
    names = pipe.class_names.id2label or {}
    assert classes == [f"{names.get(1, 'class 1')}, seed {seed}" for seed in (1, 6)]
