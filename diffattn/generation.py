"""Pictures from text, or from the name of a class, and the recipe in every picture's file."""

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

from diffattn.devices import dtype_name, versions
from diffattn.injection import Patch, patch
from diffattn.loading import EMBEDDED
from diffattn.sampling import SiTPipeline

EXACT = "none"
"""The method that leaves the pipeline unpatched."""

PNG_KEY = "diffattn"
"""Keyword of the PNG text chunk that holds the recipe as JSON."""

MIN_MULTIPLE = 8  # diffusers' Stable Diffusion pipelines refuse other sizes, whatever their VAE
MAX_SEED = 2**63 - 1
DEFAULT_GUIDANCE = 7.5


@dataclass(frozen=True)
class Request:
    """What to draw. Everything but `model` and the size is checked here, and raises `ValueError`."""

    model: str  # as it was asked for; written into the recipe
    prompt: str  # may be empty; for a SiT the name or id of a class
    negative_prompt: str = ""
    method: str | None = None  # a name in `diffattn.METHODS`, or "none"; None: see `default_method`
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    steps: int = 25
    guidance: float | None = None  # 1 and below: without; None: the embedded model's own, or 7.5
    width: int | None = None  # pixels; None: what the model was trained for
    height: int | None = None
    num_images: int = 1  # image i has the seed `seed + i`
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "steps", self.steps, "1 or more")
        guidance = 1 if self.guidance is None else self.guidance
        _check(math.isfinite(guidance) and guidance >= 0, "guidance", guidance, "0 or more")
        _check(self.num_images >= 1, "num-images", self.num_images, "1 or more")
        _check(0 <= self.seed <= MAX_SEED - self.num_images, "seed", self.seed, "at least 0 and below 2^63")
        if self.method == EXACT and (self.preset or self.options):
            raise ValueError(f"method {EXACT!r} has no preset and no options")


@dataclass(frozen=True)
class Picture:
    """One picture and how it was made."""

    image: Image.Image
    seed: int
    seconds: float
    recipe: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write a PNG that carries the recipe; makes the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngImagePlugin.PngInfo()
        text.add_text(PNG_KEY, json.dumps(self.recipe))  # JSON escapes what a tEXt chunk cannot hold
        self.image.save(path, pnginfo=text)


def recipe_of(path: Path) -> dict[str, Any]:
    """The recipe a PNG carries.

    Raises:
        ValueError: not a PNG, or not one that `Picture.save` wrote.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
    except OSError as error:
        raise ValueError(f"{str(path)!r} is not a picture: {error}") from None
    if text is None:
        raise ValueError(f"{str(path)!r} carries no {PNG_KEY} recipe")
    return json.loads(text)


def request_of(recipe: Mapping[str, Any]) -> Request:
    """The request that draws the picture of a recipe again."""
    return Request(**{name: recipe[name] for name in Request.__dataclass_fields__ if name in recipe})


def prepare(pipe: DiffusionPipeline, request: Request) -> tuple[Request, Patch | None]:
    """Check a request against a pipeline, and patch it if the request says so.

    Returns:
        The request with its size, guidance and preset filled in, and the patch (None for method "none").

    Raises:
        TypeError: the pipeline draws neither from text alone nor from classes, or its architecture is not supported.
        ValueError: a size the VAE cannot divide; an unknown class; as `diffattn.patch`.
    """
    if isinstance(pipe, SiTPipeline):
        if request.negative_prompt:
            raise ValueError(f"{type(pipe).__name__} draws classes and takes no negative_prompt")
        pipe.get_label_ids(_label(request.prompt))
    else:
        _check_draws_from_text(pipe)
    width, height = request.width, request.height
    if width is None or height is None:
        own_width, own_height = _default_size(pipe)
        width = own_width if width is None else width
        height = own_height if height is None else height
    check_size(pipe, width, height)
    found, preset, method = None, request.preset, request.method or default_method(pipe)
    if method != EXACT:
        found = patch(pipe, method, preset=preset, **request.options)
        preset = found.plan.preset
    own = EMBEDDED[request.model].guidance if request.model in EMBEDDED else DEFAULT_GUIDANCE
    guidance = own if request.guidance is None else request.guidance
    return replace(request, width=width, height=height, method=method, preset=preset, guidance=guidance), found


def default_method(pipe: DiffusionPipeline) -> str:
    """The method for a pipeline: "mediator" where the model learned mediators, "agent" elsewhere."""
    return "mediator" if isinstance(pipe, SiTPipeline) and pipe.transformer.mediators else "agent"


def _label(prompt: str) -> int | str:
    """A class id is written in digits."""
    return int(prompt) if prompt.isdecimal() else prompt


def generate(pipe: DiffusionPipeline, request: Request, on_step: Callable[[], None] | None = None) -> Iterator[Picture]:
    """Draw the pictures of a request that went through `prepare`, one after the other.

    Each has its own generator, so that it can be drawn again alone.

    Args:
        pipe: on the device it is to run on.
        request: what to draw.
        on_step: called after every sampling step.
    """
    subject: dict[str, Any] = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if isinstance(pipe, SiTPipeline):
        subject = {"class_labels": _label(request.prompt)}
    arguments: dict[str, Any] = {
        **subject,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "width": request.width,
        "height": request.height,
    }
    if on_step is not None:
        arguments["callback_on_step_end"] = _step_callback(on_step)
    draw: Any = pipe
    for seed in range(request.seed, request.seed + request.num_images):
        begin = time.perf_counter()
        image = draw(**arguments, generator=torch.Generator().manual_seed(seed)).images[0]
        seconds = time.perf_counter() - begin
        yield Picture(image, seed, seconds, _recipe(pipe, request, seed))


def check_size(pipe: DiffusionPipeline, width: int, height: int) -> None:
    """Raise `ValueError` for pixels the VAE cannot divide, naming the nearest sizes it can."""
    unit = math.lcm(MIN_MULTIPLE, int(getattr(pipe, "vae_scale_factor", 1)))
    if isinstance(pipe, SiTPipeline):
        unit = pipe.transformer.patch_size * pipe.vae_scale_factor
    for name, size in (("width", width), ("height", height)):
        if size < 1 or size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            near = f"{below} or {above}" if below > 0 else str(max(above, unit))
            raise ValueError(f"{name} {size} is not a positive multiple of {unit} pixels; nearest: {near}")


def _default_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels the denoiser was trained for."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if size is None:
        raise ValueError(f"{type(pipe).__name__} has no size of its own; give width and height")
    rows, columns = (size, size) if isinstance(size, int) else size
    return columns * pipe.vae_scale_factor, rows * pipe.vae_scale_factor


def _check_draws_from_text(pipe: Any) -> None:
    accepted = inspect.signature(pipe.__call__).parameters
    needed = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "generator")
    missing = [name for name in needed if name not in accepted]
    if missing or "image" in accepted or not hasattr(pipe, "vae_scale_factor"):
        what = "takes a picture as input" if "image" in accepted else f"takes no {', '.join(missing) or 'size'}"
        raise TypeError(f"{type(pipe).__name__} {what}; pictures are drawn from text alone here")


def _step_callback(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    return callback


def _recipe(pipe: Any, request: Request, seed: int) -> dict[str, Any]:
    """All it takes to draw one picture again."""
    return _fields(request) | {
        "num_images": 1,
        "seed": seed,
        "scheduler": type(pipe.scheduler).__name__,
        "pipeline": type(pipe).__name__,
        "dtype": dtype_name(pipe.dtype),
        "device": str(pipe.device),
        "versions": versions(),
    }


def _fields(request: Request) -> dict[str, Any]:
    return asdict(request) | {"options": dict(request.options)}


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
