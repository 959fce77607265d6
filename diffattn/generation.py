"""Pictures from text, or from the name of a class, and the recipe in every picture's file."""

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from PIL import Image, PngImagePlugin

from diffattn.devices import dtype_name, versions
from diffattn.injection import Patch, patch
from diffattn.loading import EMBEDDED
from diffattn.sampling import SiTPipeline
from diffattn.sampling.class_pipelines import check_null_class, class_ids, draws_classes

EXACT = "none"
"""The method that leaves the pipeline unpatched."""

PNG_KEY = "diffattn"
"""Keyword of the PNG text chunk that holds the recipe as JSON."""

MIN_MULTIPLE = 8  # diffusers' Stable Diffusion pipelines refuse other sizes, whatever their VAE
MAX_SEED = 2**63 - 1
DEFAULT_GUIDANCE = 7.5  # of pipelines that draw from text with a UNet; see `own_guidance`


@dataclass(frozen=True)
class Request:
    """What to draw. Everything but `model` and the size is checked here, and raises `ValueError`."""

    model: str  # as it was asked for; written into the recipe
    prompt: str  # may be empty; for a DiT or SiT the name or id of a class
    negative_prompt: str = ""
    method: str | None = None  # a name in `diffattn.METHODS`, or "none"; None: see `default_method`
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    recipe: Mapping[str, Any] | None = None  # for `diffattn.patch`: the method and what else is not given here
    steps: int = 25
    guidance: float | None = None  # 1 and below: without; None: see `own_guidance`
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
        if self.method == EXACT and (self.preset or self.options or self.recipe is not None):
            raise ValueError(f"method {EXACT!r} has no preset, no options and no recipe")


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
        ValueError: a size the pipeline cannot draw; an unknown class; as `diffattn.patch`.
    """
    guidance = own_guidance(pipe, request.model) if request.guidance is None else request.guidance
    if isinstance(pipe, SiTPipeline):
        guidance = max(guidance, 1.0)  # only at 1 it draws without
    if draws_classes(pipe):
        if request.negative_prompt:
            raise ValueError(f"{type(pipe).__name__} draws classes and takes no negative_prompt")
        class_ids(pipe, [request.prompt])
        check_null_class(pipe, guidance)
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
        found = patch(pipe, method, preset=preset, recipe=request.recipe, **request.options)
        preset, method = found.plan.preset, found.plan.method
        if request.method not in (None, method):
            found.remove()
            raise ValueError(f"the recipe is for method {method!r}, not {request.method!r}")
    return replace(request, width=width, height=height, method=method, preset=preset, guidance=guidance), found


def default_method(pipe: DiffusionPipeline) -> str:
    """The method for a pipeline: "mediator" where the model learned mediators, "agent" elsewhere."""
    return "mediator" if isinstance(pipe, SiTPipeline) and pipe.transformer.mediators else "agent"


def own_guidance(pipe: Any, model: str) -> float:
    """The guidance scale of a model by name: what an embedded one recommends, or what its pipeline takes for itself.

    7.5 for Stable Diffusion and wherever the pipeline is not one of diffusers' DiT and PixArt.
    """
    if model in EMBEDDED:
        return EMBEDDED[model].guidance
    if isinstance(pipe, DiTPipeline | PixArtAlphaPipeline | PixArtSigmaPipeline):
        return float(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)
    return DEFAULT_GUIDANCE


def generate(pipe: DiffusionPipeline, request: Request, on_step: Callable[[], None] | None = None) -> Iterator[Picture]:
    """Draw the pictures of a request that went through `prepare`, one after the other.

    Each has its own generator, so that it can be drawn again alone.

    Args:
        pipe: on the device it is to run on.
        request: what to draw.
        on_step: called after every sampling step, `request.steps` times a picture.
    """
    arguments = call_arguments(pipe, request)
    draw: Any = pipe
    for seed in range(request.seed, request.seed + request.num_images):
        begin = time.perf_counter()
        with _telling(pipe, request.steps, on_step) as callback:
            image = draw(**arguments, **callback, generator=torch.Generator().manual_seed(seed)).images[0]
        seconds = time.perf_counter() - begin
        yield Picture(image, seed, seconds, _recipe(pipe, request, seed))


def call_arguments(pipe: DiffusionPipeline, request: Request) -> dict[str, Any]:
    """What a pipeline is called with for a request that went through `prepare`, but for its generator."""
    subject: dict[str, Any] = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if draws_classes(pipe):
        subject = {"class_labels": class_ids(pipe, [request.prompt])}
    steps = {"num_inference_steps": request.steps, "guidance_scale": request.guidance}
    return subject | steps | size_arguments(pipe, request.width, request.height)


def size_arguments(pipe: Any, width: int | None, height: int | None) -> dict[str, int]:
    """What a pipeline is called with for a size, None for its own; a `DiTPipeline` draws no other and is told nothing.

    Raises:
        ValueError: another size for a `DiTPipeline`.
    """
    if isinstance(pipe, DiTPipeline):
        own = _default_size(pipe)
        check_size(pipe, own[0] if width is None else width, own[1] if height is None else height)
        return {}
    return {name: size for name, size in (("width", width), ("height", height)) if size is not None}


def check_size(pipe: DiffusionPipeline, width: int, height: int) -> None:
    """Raise `ValueError` for pixels the pipeline cannot draw, naming the nearest sizes it can."""
    if isinstance(pipe, DiTPipeline):
        own = _default_size(pipe)
        if (width, height) != own:
            raise ValueError(f"{type(pipe).__name__} draws {own[0]}x{own[1]} pixels only, got {width}x{height}")
        return
    unit = math.lcm(MIN_MULTIPLE, pixels_per_latent(pipe))
    if isinstance(pipe, SiTPipeline):
        unit = pipe.transformer.patch_size * pipe.vae_scale_factor
    for name, size in (("width", width), ("height", height)):
        if size < 1 or size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            near = f"{below} or {above}" if below > 0 else str(max(above, unit))
            raise ValueError(f"{name} {size} is not a positive multiple of {unit} pixels; nearest: {near}")


def pixels_per_latent(pipe: Any) -> int:
    """Pixels along the side of a latent; `DiTPipeline` does not say it."""
    if isinstance(pipe, DiTPipeline):
        return 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return int(getattr(pipe, "vae_scale_factor", 1))


def _default_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels the denoiser was trained for."""
    size = getattr(getattr(_denoiser(pipe), "config", None), "sample_size", None)
    if size is None:
        raise ValueError(f"{type(pipe).__name__} has no size of its own; give width and height")
    rows, columns = (size, size) if isinstance(size, int) else size
    return columns * pixels_per_latent(pipe), rows * pixels_per_latent(pipe)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def _check_draws_from_text(pipe: Any) -> None:
    accepted = inspect.signature(pipe.__call__).parameters
    needed = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "generator")
    missing = [name for name in needed if name not in accepted]
    if missing or "image" in accepted or not hasattr(pipe, "vae_scale_factor"):
        what = "takes a picture as input" if "image" in accepted else f"takes no {', '.join(missing) or 'size'}"
        raise TypeError(f"{type(pipe).__name__} {what}; pictures are drawn from text alone here")


@contextmanager
def _telling(pipe: Any, steps: int, on_step: Callable[[], None] | None) -> Iterator[dict[str, Any]]:
    """Within, `on_step` is called after every step: by the argument of the pipeline that is given, or by a hook."""
    if on_step is None:
        yield {}
        return
    tell = _teller(pipe, steps, on_step)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        yield {"callback_on_step_end": lambda *_: tell() or {}}
    else:
        with _denoiser(pipe).register_forward_hook(lambda *_: tell()):
            yield {}


def _teller(pipe: Any, steps: int, on_step: Callable[[], None]) -> Callable[[], None]:
    """To be called after every call of the denoiser: calls `on_step` after the last one of every step.

    A scheduler of order 2 takes two calls a step, but for the last one; PNDM takes one call more than there are steps.
    """
    calls, told = count(1), count(1)

    def tell() -> None:
        call = next(calls)
        whole = call % pipe.scheduler.order == 0 or call == len(pipe.scheduler.timesteps)
        if whole and next(told) <= steps:
            on_step()

    return tell


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
