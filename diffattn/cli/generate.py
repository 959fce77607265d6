"""`diffattn generate`."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import (
    bad_input,
    check_apart,
    check_writable,
    fail,
    loading,
    progress,
    read_options,
    stdout,
    write_json,
)
from diffattn.cli.options import (
    Device,
    Dtype,
    Guidance,
    Height,
    JsonFile,
    Method,
    Model,
    Options,
    Preset,
    Recipe,
    Seed,
    Steps,
    Variant,
    Width,
)

OUT = Path("outputs/generate")
NEGATIVE = 'What to keep out of the picture. For some models, e.g. SDXL, "" differs from none.'
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw (may be empty); for a DiT or SiT a class name or id.")],
    model: Model = "emoji-sd",
    variant: Variant = None,
    negative_prompt: Annotated[str | None, typer.Option(help=NEGATIVE, show_default="none")] = None,
    method: Method = None,
    preset: Preset = None,
    option: Options = None,
    recipe: Recipe = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    width: Width = None,
    height: Height = None,
    num_images: Annotated[int, typer.Option(help="Number of pictures; picture i uses seed SEED + i.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG file, or a folder for files named after prompt and seed.")] = OUT,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Draw pictures with a pipeline of diffusers that draws from text alone or by class, or with a SiT of this project.

    The record of every picture (prompt, seed, options, versions ...) is stored in its PNG, under "diffattn".
    """
    names = _names(out, prompt, seed, num_images)
    check_writable(json)
    check_apart(json, *names)
    with loading(model), bad_input():
        from diffattn.drawing.draw import prepare
        from diffattn.drawing.loading import load_pipeline
        from diffattn.drawing.request import Request
        from diffattn.machine import choose_device, choose_dtype
        from diffattn.patching.recipe import read_recipe

        request = Request(
            model=model, prompt=prompt, negative_prompt=negative_prompt, method=method, preset=preset,
            options=read_options(option or []), recipe=read_recipe(recipe) if recipe else None, steps=steps,
            guidance=guidance, width=width, height=height, num_images=num_images, seed=seed, variant=variant,
        )  # fmt: skip
        place = choose_device(device)
        pipe: Any = load_pipeline(model, choose_dtype(dtype, place), variant).to(place)
        request, patch = prepare(pipe, request)
    with progress("drawing", total=steps * num_images) as advance:
        pictures = _draw(pipe, request, names, advance)
    _say_how(pipe, request, guidance)
    report = patch.report() if patch else None
    if report:
        stdout.print(str(report), markup=False)
    write_json(json, {"pictures": pictures, "report": report.to_dict() if report else None})


def _say_how(pipe: Any, request: Any, given: float | None) -> None:
    """Sampler, steps and guidance; where a model without a null class rules guidance out, why."""
    from diffattn.drawing.classes import unguided_note

    guidance = "the pipeline's own guidance" if request.guidance is None else f"guidance {request.guidance:g}"
    stdout.print(f"{type(pipe.scheduler).__name__}, {request.steps} steps, {guidance}", markup=False)
    if note := unguided_note(pipe, given):
        stdout.print(note, markup=False)


def _draw(pipe: Any, request: Any, names: list[Path], advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Draw and save every picture of a request. → the JSON entry of each"""
    from diffattn.drawing.batch import NotFinite
    from diffattn.drawing.draw import generate as draw

    pipe.set_progress_bar_config(disable=True)
    pictures = []
    drawn = draw(pipe, request, advance)
    with bad_input(ValueError):  # some bad input is only noticed by the scheduler or at the first step
        first = next(drawn)
    with bad_input(NotFinite):
        for name, picture in zip(names, chain([first], drawn), strict=True):
            picture.save(name)
            pictures.append({"file": str(name), "seconds": round(picture.seconds, 3), **picture.record})
            blanked = ", blanked by the model's safety checker" if picture.blanked else ""
            stdout.print(f"{name}  {picture.seconds:.2f} s, seed {picture.seed}{blanked}", markup=False)
    if count := sum(picture["blanked"] for picture in pictures):
        stdout.print(f"{count} of {len(pictures)} pictures were blanked by the model's safety checker", markup=False)
    return pictures


def _names(out: Path, prompt: str, seed: int, num_images: int) -> list[Path]:
    """Paths of the pictures: a single one as named, several with their seeds appended."""
    try:
        names = _files(out, prompt, range(seed, seed + num_images))
    except OSError as error:  # for example a name that is too long
        fail(f"cannot write to {str(out)!r}: {error.strerror}")
    for name in names:
        check_writable(name)
    return names


def _files(out: Path, prompt: str, seeds: range) -> list[Path]:
    if out.suffix.lower() in PICTURES and not out.is_dir():
        if out.suffix.lower() != ".png":
            fail(f"--out {str(out)!r}: pictures can only be written as .png")
        return [out] if len(seeds) == 1 else [out.with_name(f"{out.stem}-{s}{out.suffix}") for s in seeds]
    from diffattn.files import stem_of

    return [out / f"{stem_of(prompt)}-{s}.png" for s in seeds]
