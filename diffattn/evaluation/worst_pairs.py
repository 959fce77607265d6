"""The pairs that differ most, on a sheet to look at: a mean hides them.

Shapes: N pairs, H, W pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffattn.drawing.batch import to_pictures
from diffattn.drawing.sheet import amplified, comparison_sheet
from diffattn.evaluation.picture_set import PictureSet
from diffattn.files import write_whole

SHEET = "worst_pairs.png"
RANKING = {"lpips": -1, "dino_i": 1, "clip_i": 1, "foreground_psnr": 1, "psnr": 1}
"""Scores that rank pairs, of which the first that was measured counts -> 1 where lower is worse, -1 where higher is."""

NAMES = {"lpips": "LPIPS", "dino_i": "DINO-I", "clip_i": "CLIP-I", "foreground_psnr": "foreground PSNR", "psnr": "PSNR"}
SIDES = 160, 384  # pixels of a picture's longer side on the sheet, least and most


@dataclass(frozen=True)
class WorstPairs:
    """Positions in the set of the worst pairs, the worst first, and of the median pair."""

    by: str
    values: Tensor  # [N], of the score `by`
    worst: tuple[int, ...]
    middle: int

    @classmethod
    def of(cls, values: Mapping[str, Tensor], count: int) -> "WorstPairs":
        """The `count` worst by the first score of `RANKING` among the values [N].

        PSNR replaces a foreground PSNR that is NaN, since a white picture without foreground may be painted over.
        """
        by = next(name for name in RANKING if name in values)
        found = values[by].double()
        if by == "foreground_psnr":
            found = torch.where(found.isnan(), values["psnr"].double(), found)
        order = (RANKING[by] * found).argsort(stable=True).tolist()
        return cls(by, found, tuple(order[:count]), order[len(order) // 2])

    def figure(self, position: int) -> str:
        """The pair's score in words."""
        value = self.values[position].item()
        if math.isinf(value):
            return "identical"
        return f"{NAMES[self.by]} " + (f"{value:.1f} dB" if self.by.endswith("psnr") else f"{value:.3f}")

    def sheet(
        self, pictures: PictureSet, exact: PictureSet, titles: Sequence[str], columns: tuple[str, str]
    ) -> Image.Image:
        """Rows: the worst pairs, then the median one. Columns: the partner, the picture, their difference.

        The median pair is omitted if it is among the worst. All differences are amplified by the same factor. Pictures
        are scaled to be visible, see `SIDES`.

        Args:
            pictures, exact: of one size.
            titles: of every picture [N].
            columns: what partners and pictures are.
        """
        rows = [*dict.fromkeys((*self.worst, self.middle))]
        mine, partners = (torch.cat([x.batch(i, i + 1) for i in rows]) / 255 for x in (pictures, exact))
        difference, factor = amplified(mine, partners)
        heads = [f"{titles[i]}: {self.figure(i)}" for i in rows]
        if self.middle not in self.worst:
            heads[-1] = f"median of {len(self.values)} pairs: {heads[-1]}"
        shown = zip(*(map(_fitted, to_pictures(x)) for x in (partners, mine, difference)), strict=True)
        return comparison_sheet(
            list(zip(heads, shown, strict=True)), [*columns, f"difference, x{factor}" if factor > 1 else "difference"]
        )

    def details(self, numbers: Sequence[int], titles: Sequence[str]) -> dict[str, Any]:
        """The pairs as JSON types; numbers [N] of the pictures, counted from 0."""

        def pair(position: int) -> dict[str, Any]:
            value = self.values[position].item()
            known = None if math.isinf(value) else float(f"{value:.7g}")
            return {"number": numbers[position], "title": titles[position], self.by: known}

        return {"by": self.by, "sheet": SHEET, "worst": [pair(i) for i in self.worst], "middle": pair(self.middle)}


def save_sheet(sheet: Image.Image, folder: Path) -> None:
    """Write it as `SHEET`, see `write_whole`."""
    write_whole(folder / SHEET, lambda part: sheet.save(part, format="PNG"))


def _fitted(picture: Image.Image) -> Image.Image:
    """Scale a picture to within `SIDES`; small ones by a whole factor, so that pixels stay sharp."""
    least, most = SIDES
    width, height = picture.size
    side = max(width, height)
    if side < least:
        factor = -(-least // side)
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    if side <= most:
        return picture
    return picture.resize((round(width * most / side), round(height * most / side)), Image.Resampling.LANCZOS)
