"""The models and accelerations that a visitor may choose; all others are refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffattn.drawing.loading import EMBEDDED, HUB_ID, INDEX, embedded_folder, embedded_models
from diffattn.drawing.request import UNPATCHED, Request
from diffattn.files import read_json
from diffattn.methods import METHODS
from diffattn.metrics.extractors import EXTRACTORS

AUTOMATIC = "automatic"
"""The acceleration that selects the model's default method with preset "balanced"."""

RECIPE = "recipe"
"""Name of the variant in a comparison that comes from a recipe file."""

CLASS_PIPELINES = ("SiTPipeline", "DiTPipeline")

MAX_DEPTH = 2  # how deep below the models' folder a model may be


def accelerations() -> list[str]:
    """The allowed values: "automatic", "none", and every "method/preset"."""
    return [AUTOMATIC, UNPATCHED, *(f"{name}/{preset}" for name, kind in METHODS.items() for preset in kind.presets)]


def method_and_preset(acceleration: object) -> tuple[str | None, str | None]:
    """Method and preset of a `Request` for one of `accelerations`; raises `ValueError` for anything else."""
    if acceleration not in accelerations():
        raise ValueError(f"unknown acceleration {str(acceleration)[:60]!r}; allowed: {', '.join(accelerations())}")
    if acceleration == AUTOMATIC:
        return None, None
    method, _, preset = str(acceleration).partition("/")
    return method, preset or None


def acceleration_of(request: Request) -> list[str]:
    """The one of `accelerations` that a request asks for; none if a recipe or options decide."""
    if request.recipe is not None or request.options:
        return []
    if request.method is None:
        return [AUTOMATIC]
    return [f"{request.method}/{request.preset}" if request.preset else request.method]


@dataclass(frozen=True)
class Description:
    """What a model's files say about it, without loading it."""

    what: str
    size: tuple[int, int] | None = None  # width, height in pixels it was trained for
    guidance: float | None = None  # the scale it recommends
    classes: tuple[str, ...] = ()  # of a class-conditional model
    draws_classes: bool = False
    only_its_size: bool = False  # it draws no other


@dataclass(frozen=True)
class Models:
    """The models that a visitor may use: embedded ones, those below `folder`, and hub ids.

    Without the hub nothing is downloaded, so only the extractors that ship with the package are available.
    """

    folder: Path | None = None
    hub: bool = True
    _root: Path | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{str(self.folder)!r} is not a folder of models")
        object.__setattr__(self, "_root", self.folder and self.folder.resolve())

    def names(self) -> list[str]:
        """Embedded models, then those below the folder by their path in it."""
        return embedded_models() + sorted(set(self._local()) - set(embedded_models()))

    def source(self, name: object) -> str:
        """The argument of `load_pipeline` for a model's name.

        Raises:
            ValueError: neither embedded, nor below the folder, nor an id on the hub.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError("choose a model")
        local = self._local()
        if name in embedded_models():
            return name
        if name in local:
            return str(local[name])
        owner_and_name = HUB_ID.fullmatch(name) and not any(set(part) <= {"."} for part in name.split("/"))
        if self.hub and owner_and_name and ".." not in name and not Path(name).exists():
            return name
        allowed = ", ".join(self.names()) + (", or a hub id (owner/name)" if self.hub else "")
        raise ValueError(f"model {name[:80]!r} is not available here; choose one of: {allowed}")

    def place(self, name: object) -> Path | None:
        """The folder of a model, None for one on the hub; raises like `source`."""
        source = self.source(name)
        folder = embedded_folder(source) if source in embedded_models() else Path(source)
        return folder if (folder / INDEX).is_file() else None

    def is_local(self, name: object) -> bool:
        """Whether a name belongs to a model below the folder; raises like `source`."""
        return self.source(name) != name

    def extractors(self) -> list[str]:
        """The extractors that a visitor may choose."""
        return [name for name in EXTRACTORS if self.hub or (embedded_folder(name) / "config.json").is_file()]

    def describe(self, name: object) -> Description:
        """What is known about a model without loading it; raises like `source`."""
        source, folder = self.source(name), self.place(name)
        if folder is None:
            return Description(f"{source} from the hub, downloaded when it is first used")
        index, known = _json(folder / INDEX), EMBEDDED.get(source)
        kind, labels = str(index.get("_class_name", "pipeline"))[:80], index.get("id2label")
        return Description(
            what=known.what if known else f"a {kind}",
            size=_size(folder),
            guidance=known.guidance if known else _number(index.get("guidance_scale")),
            classes=tuple(str(label)[:80] for label in labels.values()) if isinstance(labels, dict) else (),
            draws_classes=kind in CLASS_PIPELINES,
            only_its_size=kind == "DiTPipeline",
        )

    def _local(self) -> dict[str, Path]:
        """Path in the folder -> the folder of a model; links that lead outside are excluded."""
        found: dict[str, Path] = {}
        for depth in range(1, MAX_DEPTH + 1) if self._root else ():
            assert self._root is not None
            for index in self._root.glob("/".join(["*"] * depth + [INDEX])):
                place = index.parent.resolve()
                if place.is_relative_to(self._root):
                    found[index.parent.relative_to(self._root).as_posix()] = place
        return found


def _size(folder: Path) -> tuple[int, int] | None:
    """Pixels a saved pipeline was trained for: its denoiser's size times its VAE's factor; None if unknown."""
    denoiser = _json(folder / "unet" / "config.json") or _json(folder / "transformer" / "config.json")
    size, stages = denoiser.get("sample_size"), _json(folder / "vae" / "config.json").get("block_out_channels", [0])
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        return None
    factor = 2 ** (len(stages) - 1) if isinstance(stages, list) and 0 < len(stages) < 16 else 1
    return sides[1] * factor, sides[0] * factor


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty for anything else, since loading the model will report what is wrong with it."""
    try:
        return read_json(path)
    except ValueError:
        return {}
