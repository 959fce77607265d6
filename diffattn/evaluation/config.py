"""What an evaluation measures, and how it reads pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffattn.metrics.extractors import FeatureExtractor


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how to read pictures.

    Raises:
        ValueError: a negative number of worst pairs.
    """

    extractor: str | FeatureExtractor = "inception"  # a name for `load_extractor`
    extractor_weights: str | Path | None = None
    clip: str | Path | None = None  # folder or hub id of a CLIP model: CLIP score of pictures and prompts
    pickscore: str | Path | None = None  # the same for PickScore, a CLIP model trained on human preferences
    clip_i: str | Path | None = None  # folder or hub id of a CLIP model: CLIP-I of pairs
    dino_i: str | Path | None = None  # folder or hub id of a DINO or DINOv2: DINO-I of pairs
    lpips_weights: str | Path | None = None  # of AlexNet, see `Lpips`: LPIPS of pairs
    side: int | None = None  # pixels: crop pictures around the centre to a square and resize it; None: as they are
    skip_bad: bool = False  # leave unreadable pictures out
    prompts: Sequence[str] | None = None  # of pictures from files; picture i has i modulo their number
    limit: int | None = None  # pictures from files: this many, the first ones of every folder in natural order
    seed: int = 0  # of the draws of KID and FID∞
    device: str | torch.device = "cpu"  # for pictures from files
    worst_pairs: int = 6  # number of the pairs that differ most to show on a sheet; 0: no sheet

    def __post_init__(self) -> None:
        if self.worst_pairs < 0:
            raise ValueError(f"the number of worst pairs must be 0 or more, got {self.worst_pairs}")
