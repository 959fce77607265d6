"""Draws pictures from text or class names."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from diffusers import DiffusionPipeline

from diffattn.architectures.denoisers import denoiser_of, denoisers_of
from diffattn.drawing.batch import NotFinite, draw_batch, to_pictures
from diffattn.drawing.classes import check_null_class, class_ids, draws_classes, why_unguided
from diffattn.drawing.loading import EMBEDDED
from diffattn.drawing.request import UNPATCHED, Picture, Request
from diffattn.drawing.sizes import drawn_size, pixels_per_latent, size_arguments
from diffattn.machine import dtype_name, versions
from diffattn.patching.default_method import layers_of
from diffattn.patching.patch import Patch, find_patch, patch
from diffattn.patching.plan import Plan
from diffattn.sampling import SiTPipeline

OF_VIDEOS = {"num_frames", "frames", "video_length", "video"}
"""Arguments that only pipelines of videos take."""


def prepare(pipe: DiffusionPipeline, request: Request) -> tuple[Request, Patch | None]:
    """Check a request against a pipeline, and patch the pipeline if the request asks for a method.

    Returns:
        The request with its size, guidance and preset filled in, and the patch (None for method "none"). The filled-in
        values are the pipeline's own defaults. A negative prompt is not filled in, because SDXL distinguishes an empty
        one from none.

    Raises:
        TypeError: the pipeline draws neither from text alone nor from classes, or its architecture is not supported.
        ValueError: a size the pipeline cannot draw; an option that leaves nothing to accelerate there; an unknown
            class; a negative prompt for a pipeline that takes none; see also `diffattn.patch`.
    """
    guidance = guidance_for(pipe, request.guidance, request.model)
    if not draws_classes(pipe):
        _check_draws_from_text(pipe)
    if request.negative_prompt and not takes_negative_prompt(pipe):
        what = "draws classes and" if draws_classes(pipe) else "draws from text, but"
        raise ValueError(f"{type(pipe).__name__} {what} takes no negative_prompt")
    if draws_classes(pipe):
        class_ids(pipe, [request.prompt])
        check_null_class(pipe, 1.0 if guidance is None else guidance)
    width, height = drawn_size(pipe, request.width, request.height)
    found, preset, method = None, request.preset, request.method
    if method != UNPATCHED:
        given = {"recipe": request.recipe, "decisions": request.decisions}
        _check_options(pipe, request)
        found = patch(pipe, method, preset=preset, **given, **request.options)
        preset, method = found.plan.preset, found.plan.method
        if request.method not in (None, method):
            found.remove()
            raise ValueError(f"the recipe is for method {method!r}, not {request.method!r}")
        if error := found.out_of_range(height // pixels_per_latent(pipe), width // pixels_per_latent(pipe)):
            found.remove()
            raise ValueError(error)
    return replace(request, width=width, height=height, method=method, preset=preset, guidance=guidance), found


def _check_options(pipe: Any, request: Request) -> None:
    """Raise `ValueError` for what is no option of the method, also for the other arguments of `patch`."""
    layers = layers_of(denoisers_of(pipe))
    Plan.read(request.method, request.preset, request.recipe, None, None, request.options, layers)


def own_guidance(pipe: Any, model: str = "") -> float | None:
    """The model's own guidance scale, used when none is given.

    Args:
        pipe: any pipeline.
        model: the name it was loaded with.

    Returns:
        What the card of an embedded model recommends or a `SiTPipeline` was saved with, otherwise the default of the
        pipeline's call (7.5 for Stable Diffusion, 5 for SDXL, 4 for DiT). 1 (no guidance) for a class-conditional model
        without a null class. None if the default is not a number: the pipeline then decides.
    """
    if draws_classes(pipe) and why_unguided(pipe) is not None:
        return 1.0
    if model in EMBEDDED:
        return EMBEDDED[model].guidance
    if isinstance(pipe, SiTPipeline):
        return pipe.own_guidance
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter and isinstance(parameter.default, int | float) else None


def guidance_for(pipe: Any, given: float | None, model: str = "") -> float | None:
    """The guidance scale to draw with: the given one or `own_guidance`; at least 1 (off) for a SiT."""
    guidance = own_guidance(pipe, model) if given is None else given
    return guidance if guidance is None or not isinstance(pipe, SiTPipeline) else max(guidance, 1.0)


def takes_negative_prompt(pipe: Any) -> bool:
    """Whether a pipeline accepts a negative prompt."""
    return "negative_prompt" in inspect.signature(pipe.__call__).parameters


def generate(pipe: DiffusionPipeline, request: Request, on_step: Callable[[], None] | None = None) -> Iterator[Picture]:
    """Draw the pictures of a request returned by `prepare`, one at a time.

    Each has its own generator, so that it can be redrawn on its own.

    Args:
        pipe: on its target device.
        request: what to draw.
        on_step: called after every sampling step, `request.steps` times per picture.

    Raises:
        NotFinite: a picture has NaN or infinite values; no further pictures are drawn.
    """
    subject, settings = _subject(pipe, request), _settings(pipe, request)
    for seed in range(request.seed, request.seed + request.num_images):
        begin = time.perf_counter()
        with _reporting(pipe, request.steps, on_step) as callback:
            batch = draw_batch(pipe, [subject], [seed], settings | callback)
        if not batch.finite[0]:
            raise NotFinite(pipe, seed)
        (image,) = to_pictures(batch.images)
        seconds = time.perf_counter() - begin
        record = _record(pipe, request, seed) | {"blanked": batch.blanked[0]}
        yield Picture(image, seed, seconds, record, batch.blanked[0])


def call_arguments(pipe: DiffusionPipeline, request: Request) -> dict[str, Any]:
    """The pipeline's arguments for a request returned by `prepare`, except the generator."""
    subject = _subject(pipe, request)
    key = {"class_labels": [subject]} if draws_classes(pipe) else {"prompt": subject}
    return key | _settings(pipe, request)


def _subject(pipe: Any, request: Request) -> str | int:
    """The prompt, or the id of the class."""
    return class_ids(pipe, [request.prompt])[0] if draws_classes(pipe) else request.prompt


def _settings(pipe: Any, request: Request) -> dict[str, Any]:
    """All other arguments; unset ones are omitted, since a pipeline may treat None differently."""
    found: dict[str, Any] = {"num_inference_steps": request.steps}
    if request.guidance is not None:
        found["guidance_scale"] = request.guidance
    if request.negative_prompt is not None and takes_negative_prompt(pipe):
        found["negative_prompt"] = request.negative_prompt
    return found | size_arguments(pipe, request.width, request.height)


def _check_draws_from_text(pipe: Any) -> None:
    accepted = inspect.signature(pipe.__call__).parameters
    if not OF_VIDEOS.isdisjoint(accepted):
        raise TypeError(
            f"{type(pipe).__name__} draws videos, and only pictures are drawn here; in Python, diffattn.patch(pipe) "
            "accelerates it"
        )
    needed = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "generator")
    missing = [name for name in needed if name not in accepted]
    if missing or "image" in accepted or not hasattr(pipe, "vae_scale_factor"):
        what = "takes a picture as input" if "image" in accepted else f"takes no {', '.join(missing) or 'size'}"
        raise TypeError(f"{type(pipe).__name__} {what}; pictures are drawn from text alone here")


@contextmanager
def _reporting(pipe: Any, steps: int, on_step: Callable[[], None] | None) -> Iterator[dict[str, Any]]:
    """Call `on_step` after every step within the block, through the pipeline's callback argument or a hook."""
    if on_step is None:
        yield {}
        return
    report = _counter(pipe, steps, on_step)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        yield {"callback_on_step_end": lambda *_: report() or {}}
    else:
        with denoiser_of(pipe).register_forward_hook(lambda *_: report()):
            yield {}


def _counter(pipe: Any, steps: int, on_step: Callable[[], None]) -> Callable[[], None]:
    """A hook for the denoiser that calls `on_step` after the last call of every step.

    A scheduler of order 2 makes two calls per step except the last; PNDM makes one call more than the number of steps.
    """
    calls, reported = count(1), count(1)

    def report() -> None:
        call = next(calls)
        whole = call % pipe.scheduler.order == 0 or call == len(pipe.scheduler.timesteps)
        if whole and next(reported) <= steps:
            on_step()

    return report


def _record(pipe: Any, request: Request, seed: int) -> dict[str, Any]:
    """Everything needed to redraw one picture."""
    patched = None if request.method == UNPATCHED else find_patch(pipe)
    return _fields(request) | {
        "num_images": 1,
        "decisions": patched and patched.decisions(),
        "seed": seed,
        "scheduler": type(pipe.scheduler).__name__,
        "pipeline": type(pipe).__name__,
        "dtype": dtype_name(pipe.dtype),
        "device": str(pipe.device),
        "versions": versions(),
    }


def _fields(request: Request) -> dict[str, Any]:
    return asdict(request) | {"options": dict(request.options)}
