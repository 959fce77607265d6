"""A comparison stored beside a model, which the page shows before the first click."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from diffattn.app.jobs.compare import Comparison, Variant
from diffattn.app.jobs.naming import naming
from diffattn.app.jobs.speed_up import SpeedUp
from diffattn.drawing.request import Picture
from diffattn.files import read_json, write_json
from diffattn.machine import describe_machine, where

FILE = "first_view.json"
EXACT_FILE, ACCELERATED_FILE = "first_view_exact.png", "first_view_accelerated.png"


@dataclass(frozen=True)
class FirstView:
    """One pair of pictures with what was measured over several."""

    model: str
    prompt: str
    acceleration: str
    size: tuple[int, int]  # width, height in pixels
    steps: int
    speedup: SpeedUp
    psnr: float  # dB, mean over the pictures
    machine: str
    exact: Path
    accelerated: Path

    @classmethod
    def read(cls, folder: Path | None) -> Self | None:
        """What is stored in a model's folder; None if nothing is.

        Raises:
            ValueError: its file is damaged, or a picture is missing.
        """
        path = folder / FILE if folder else None
        if folder is None or path is None or not path.is_file():
            return None
        with naming(folder, folder.name):
            found = read_json(path)
            pictures = folder / EXACT_FILE, folder / ACCELERATED_FILE
            try:
                width, height = found["size"]
                figures = found["speedup"]
                bounds = (float(figures[name]) for name in ("value", "low", "high"))
                faster = SpeedUp(*bounds, pairs=int(figures["pairs"]))
                view = cls(
                    str(found["model"]), str(found["prompt"]), str(found["acceleration"]), (int(width), int(height)),
                    int(found["steps"]), faster, float(found["psnr"]), str(found["machine"]), *pictures,
                )  # fmt: skip
                for picture in pictures:
                    with Image.open(picture) as image:
                        image.verify()
            except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
                raise ValueError(f"{str(path)!r} is not a first view: {type(error).__name__} {error}") from None
        return view


def write_first_view(found: Comparison, variant: Variant, device: Any, folder: Path) -> FirstView:
    """Store the first pair of a comparison and its figures in a folder, replacing what is there.

    Raises:
        ValueError: too few pictures for an interval, or pictures that do not differ.
    """
    faster = found.speedup(variant)
    if faster is None or variant.psnr is None or math.isinf(variant.psnr):
        raise ValueError(
            "a first view needs an interval and pictures that differ: draw more, or use another acceleration"
        )
    exact, accelerated = found.variants[0].pictures[0], variant.pictures[0]
    data: Mapping[str, Any] = {
        "model": found.request.model, "prompt": found.request.prompt, "acceleration": variant.name,
        "size": list(exact.image.size), "steps": found.request.steps, "speedup": asdict(faster), "psnr": variant.psnr,
        "machine": where(describe_machine(device)),
    }  # fmt: skip
    for picture, name in ((exact, EXACT_FILE), (accelerated, ACCELERATED_FILE)):
        _save(picture, folder / name)
    write_json(folder / FILE, dict(data))
    view = FirstView.read(folder)
    assert view is not None
    return view


def _save(picture: Picture, path: Path) -> None:
    picture.save(path)
