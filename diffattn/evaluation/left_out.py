"""Drawn pictures that are not scored: those a safety checker blanked, and those that are NaN or infinite."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffattn.evaluation.draw_set import CHECKS, PICTURES, UNACCELERATED, DrawConfig, picture_name
from diffattn.evaluation.picture_set import Listed, PictureSet, ProgressBar
from diffattn.evaluation.run_folder import RunFolder

BLANKED, NOT_FINITE = "blanked", "not_finite"
REASONS = {BLANKED: "were blanked by the safety checker", NOT_FINITE: "have NaN or infinite values"}
WAYS_OUT = {
    BLANKED: "choose other prompts, or load the pipeline with safety_checker=None",
    NOT_FINITE: "check the weights, or draw in float32",
}


@dataclass(frozen=True)
class LeftOut:
    """Which pictures of a run are left out of all scores."""

    config: DrawConfig
    found: Mapping[str, Mapping[str, tuple[int, ...]]]  # reason -> folder -> rows; a folder without any is left out

    @classmethod
    def of(cls, run: RunFolder, config: DrawConfig, paired: bool) -> "LeftOut":
        """The pictures that `draw_set` marked.

        Args:
            run: where the pictures are, all drawn.
            config: what they were drawn with.
            paired: the unaccelerated pictures count too, since a pair needs both of its pictures.

        Raises:
            ValueError: fewer than 2 pictures are left to score.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {reason: {} for reason in REASONS}
        for kind in (PICTURES, UNACCELERATED) if paired else (PICTURES,):
            checks = run.gather(CHECKS[kind], config.num_pictures, config.batch)
            for reason, flags in ((BLANKED, checks["blanked"]), (NOT_FINITE, ~checks["finite"])):
                if flags.any():
                    found[reason][kind] = tuple(flags.nonzero().flatten().tolist())
        left_out = cls(config, found)
        left_out._check_enough()
        return left_out

    @property
    def rows(self) -> frozenset[int]:
        """Numbers, counted from 0, of the pictures left out for any reason."""
        return frozenset(row for folders in self.found.values() for rows in folders.values() for row in rows)

    @property
    def kept(self) -> list[int]:
        """Numbers of all others, in order."""
        return [row for row in range(self.config.num_pictures) if row not in self.rows]

    def details(self) -> dict[str, Any]:
        """The seeds of the pictures by reason and folder, as JSON types."""
        seed = self.config.seed
        return {
            reason: {kind: [seed + row for row in rows] for kind, rows in folders.items()}
            for reason, folders in self.found.items()
            if folders
        }

    def sentences(self) -> list[str]:
        """One sentence per reason and folder."""
        return left_out_sentences(self.details(), self.config.num_pictures)

    def warn(self) -> None:
        """Warn about them."""
        for sentence in self.sentences():
            warnings.warn(sentence, stacklevel=2)

    def _check_enough(self) -> None:
        if len(self.kept) >= 2:
            return
        reasons = [reason for reason, folders in self.found.items() if folders]
        ways = "; ".join(WAYS_OUT[reason] for reason in reasons)
        raise ValueError(
            f"{'; '.join(self.sentences())}: {len(self.kept)} left to score, at least 2 are needed; {ways}"
        )


def left_out_sentences(details: Mapping[str, Any], total: int) -> list[str]:
    """The content of `LeftOut.details` as sentences; other details are ignored.

    Args:
        details: of a `QualityResult` too.
        total: pictures that were drawn.
    """
    found = []
    for reason, words in REASONS.items():
        for kind, seeds in details.get(reason, {}).items():
            which = "unaccelerated pictures" if kind == UNACCELERATED else "pictures"
            shown = ", ".join(map(str, seeds[:8])) + (" …" if len(seeds) > 8 else "")
            what = f"all {total} {which}" if len(seeds) == total else f"{len(seeds)} of {total} {which}"
            found.append(f"{what} {words} and are left out of the scores (seeds {shown})")
    return found


def drawn_pictures(run: RunFolder, kind: str, left_out: LeftOut, side: int | None, progress: ProgressBar) -> PictureSet:
    """The pictures of a folder of `draw_set` except those left out; the others keep their row."""
    paths = [run.path / kind / picture_name(row) for row in range(left_out.config.num_pictures)]

    def read(index: int) -> Tensor:
        with Image.open(paths[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    names = tuple(path.name for path in paths)
    return PictureSet(Listed(kind, names, read), side=side, leave_out=left_out.rows, progress=progress)
