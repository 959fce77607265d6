"""A request to draw, its pictures, and the record in every picture's file."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from diffattn.files import read_text, write_whole

UNPATCHED = "none"
"""The method that leaves the pipeline unpatched."""

PNG_KEY = "diffattn"
"""Keyword of the PNG text chunk that holds the record as JSON."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """What to draw.

    None means not given: the pipeline is then called without that argument or with its own default.

    Raises:
        ValueError: a value out of range. The model and the size are checked by `prepare`, which knows the pipeline.
    """

    model: str  # as requested; written into the record
    prompt: str  # may be empty; for a DiT or SiT the name or id of a class
    negative_prompt: str | None = None  # "" counts too: SDXL draws a different picture with it than with none
    method: str | None = None  # a name in `diffattn.METHODS`, or "none"; None: the one that suits the model
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    recipe: Mapping[str, Any] | None = None  # for `diffattn.patch`: the method and anything not given here
    decisions: Mapping[str, bool | float] | None = None  # for `diffattn.patch`; in a record: those of the picture
    steps: int = 25
    guidance: float | None = None  # 1 or less: off; None: see `own_guidance`
    width: int | None = None  # pixels; None: what the model was trained for
    height: int | None = None
    num_images: int = 1  # image i has the seed `seed + i`
    seed: int = 0
    variant: str | None = None  # of the weights, as passed to `load_pipeline`; written into the record

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "steps", self.steps, "1 or more")
        guidance = 1 if self.guidance is None else self.guidance
        _check(math.isfinite(guidance) and guidance >= 0, "guidance", guidance, "0 or more")
        _check(self.num_images >= 1, "num-images", self.num_images, "1 or more")
        _check(0 <= self.seed <= MAX_SEED - self.num_images, "seed", self.seed, "at least 0 and below 2^63")
        if self.method == UNPATCHED and (self.preset or self.options or self.recipe is not None):
            raise ValueError(f"method {UNPATCHED!r} has no preset, no options and no recipe")
        if self.method == UNPATCHED and self.decisions:
            raise ValueError(f"method {UNPATCHED!r} has no decisions")


@dataclass(frozen=True)
class Picture:
    """One picture and how it was made."""

    image: Image.Image
    seed: int
    seconds: float
    record: Mapping[str, Any]  # everything needed to redraw it
    blanked: bool = False  # blanked by the pipeline's safety checker

    def save(self, path: Path) -> None:
        """Write a PNG that contains the record, creating its folder."""
        text = PngImagePlugin.PngInfo()
        text.add_text(PNG_KEY, json.dumps(self.record))  # JSON escapes what a tEXt chunk cannot hold
        write_whole(path, partial(self.image.save, format="PNG", pnginfo=text))


def record_of(path: Path) -> dict[str, Any]:
    """The record in a PNG.

    Raises:
        ValueError: not a PNG, or not one that `Picture.save` wrote.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{str(path)!r} is not a picture: {error}") from None
    if not isinstance(text, str):
        raise ValueError(f"{str(path)!r} carries no {PNG_KEY} record")
    found = read_text(text)
    if not isinstance(found, dict):
        raise ValueError(f"the {PNG_KEY} record in {str(path)!r} is not an object")
    return found


def request_of(record: Mapping[str, Any]) -> Request:
    """The request that draws the picture of a record again."""
    return Request(**{name: record[name] for name in Request.__dataclass_fields__ if name in record})


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
