"""Pictures from text, or from the name of a class."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline

from diffattn.drawing.classes import check_null_class, class_ids, draws_classes
from diffattn.drawing.loading import EMBEDDED
from diffattn.drawing.request import EXACT, Picture, Request
from diffattn.drawing.sizes import check_size, default_size, denoiser_of, size_arguments
from diffattn.machine import dtype_name, versions
from diffattn.patching.patch import Patch, patch
from diffattn.sampling import SiTPipeline

DEFAULT_GUIDANCE = 7.5  # of pipelines that draw from text with a UNet; see `own_guidance`


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
        own_width, own_height = default_size(pipe)
        width = own_width if width is None else width
        height = own_height if height is None else height
    check_size(pipe, width, height)
    found, preset, method = None, request.preset, request.method
    if method != EXACT:
        found = patch(pipe, method, preset=preset, recipe=request.recipe, **request.options)
        preset, method = found.plan.preset, found.plan.method
        if request.method not in (None, method):
            found.remove()
            raise ValueError(f"the recipe is for method {method!r}, not {request.method!r}")
    return replace(request, width=width, height=height, method=method, preset=preset, guidance=guidance), found


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
        yield Picture(image, seed, seconds, _record(pipe, request, seed))


def call_arguments(pipe: DiffusionPipeline, request: Request) -> dict[str, Any]:
    """What a pipeline is called with for a request that went through `prepare`, but for its generator."""
    subject: dict[str, Any] = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if draws_classes(pipe):
        subject = {"class_labels": class_ids(pipe, [request.prompt])}
    steps = {"num_inference_steps": request.steps, "guidance_scale": request.guidance}
    return subject | steps | size_arguments(pipe, request.width, request.height)


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
        with denoiser_of(pipe).register_forward_hook(lambda *_: tell()):
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


def _record(pipe: Any, request: Request, seed: int) -> dict[str, Any]:
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
