"""`diffattn evaluate`, `diffattn evaluate compare`, `diffattn evaluate reference`."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import (
    Device,
    Dtype,
    JsonFile,
    Seed,
    bad_input,
    check_writable,
    fail,
    loading,
    progress,
    read_options,
    read_prompts,
    stdout,
    write_json,
)

OWN_EXTRACTOR = {"emoji-sd": "emoji-classifier", "cifar-sit": "cifar-classifier"}
EXTRACTORS = "inception, dinov2, clip, emoji-classifier or cifar-classifier"
PICTURES = 1000  # drawn by default

app = typer.Typer(
    help="Score pictures, or what a pipeline draws: against pictures, prompts, and the unaccelerated pipeline.",
    invoke_without_command=True,
)


@app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Embedded model, folder in diffusers' layout, or hub id: draw with it.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Or pictures that are there: a folder, a zip, or an ADM .npz.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="What to measure against: a folder, a zip, an .npz (pictures, or mu and sigma), or a saved reference."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt (or class) per line; pictures take them in turn.")
    ] = None,
    num_pictures: Annotated[
        int | None, typer.Option(help="N: drawn, or the first so many.", show_default="1000 drawn; all that are there")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Attention method; none: unpatched.", show_default="none; with --paired the model's own"),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the method.", show_default="the method's own")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the method; may be given several times.", show_default=False),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Recipe; it names the method.")] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Also draw the same seeds unaccelerated: PSNR, SSIM, latent error.")
    ] = False,
    paired_with: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Or compare, in order, with these pictures.", show_default=False)
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(help=f"{EXTRACTORS}; auto is the embedded model's own, else inception."),
    ] = "auto",
    extractor_weights: Annotated[
        str | None,
        typer.Option(help="File of inception's weights, folder of the others, or hub id.", show_default="usual place"),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder or hub id of a CLIP model: CLIP score.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="torchvision's AlexNet: LPIPS of the pairs.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Crop all pictures to a square and resize it.", show_default="as they are")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out.")] = False,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance scale.", show_default="7.5, of a DiT, PixArt or embedded model its own"
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    batch: Annotated[int, typer.Option(help="Pictures of one call of the pipeline.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder; a run that was interrupted goes on from there.")] = Path(
        "outputs/evaluate"
    ),
    save_npz: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the pictures as an ADM .npz.")] = (
        None
    ),
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Score pictures, or what a pipeline draws. Every result carries its protocol.

    With --reference: FID, KID, FID for infinitely many pictures, precision, recall, and sFID where the extractor has
    spatial features. With --clip and --prompts: CLIP score. With --paired or --paired-with: PSNR (of the foreground
    too), SSIM, and LPIPS with --lpips-weights. Several processes share the work under `accelerate launch -m diffattn`.
    """
    if context.invoked_subcommand is not None:
        return
    check_writable(out, folder=True)
    check_writable(json)
    check_writable(save_npz)
    with loading(model or str(pictures)), bad_input():
        from diffattn.drawing.draw import own_guidance
        from diffattn.evaluation import DrawConfig, EvaluateConfig
        from diffattn.evaluation.run_folder import processes
        from diffattn.machine import choose_device

        if (model is None) == (pictures is None):
            raise ValueError("give either --model, which draws, or --pictures")
        if paired and paired_with is not None:
            raise ValueError("give either --paired or --paired-with")
        if extractor in OWN_EXTRACTOR.values() and OWN_EXTRACTOR.get(model or "", extractor) != extractor:
            raise ValueError(
                f"the figures of {extractor!r} mean nothing for pictures of {model!r}, {OWN_EXTRACTOR[model or '']!r} "
                "is its own"
            )
        among, place = processes(choose_device(device))
        words = None if prompts is None else read_prompts(prompts)
        config = EvaluateConfig(
            extractor=OWN_EXTRACTOR.get(model or "", "inception") if extractor == "auto" else extractor,
            extractor_weights=extractor_weights, clip=clip, lpips_weights=lpips_weights, side=size, skip_bad=skip_bad,
            prompts=words, limit=num_pictures if model is None else None, device=place,
        )  # fmt: skip
        draw, acceleration, subject, name = DrawConfig(), None, pictures, None
        if model is not None:
            given = {"method": method, "preset": preset, "options": read_options(option or []), "recipe": recipe}
            subject, acceleration, name = _load(model, place, dtype, given, paired)
            draw = DrawConfig(
                num_pictures=PICTURES if num_pictures is None else num_pictures, prompts=words, steps=steps,
                guidance=own_guidance(subject, model) if guidance is None else guidance, width=width, height=height,
                seed=seed, batch=batch,
            )  # fmt: skip
        elif paired or method or preset or option or recipe:
            raise ValueError("--paired and the options of an acceleration are for a --model")
    result = _run(subject, reference, folder=out, config=config, draw=draw, acceleration=acceleration,
                  paired=paired_with or paired, name=name, npz=save_npz)  # fmt: skip
    if among.is_main:
        _show(result)
        write_json(json, result.to_dict())
        stdout.print(f"written to {out / 'result.json'}", markup=False)


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    may_differ: Annotated[
        str, typer.Option(help="Fields of the protocol that are the very thing compared, such as steps,guidance.")
    ] = "",
    json: JsonFile = None,
) -> None:
    """What the second result scores above the first. Refused if their protocols differ; the fields are named."""
    check_writable(json)
    with bad_input():
        from diffattn.evaluation.quality import QualityResult
        from diffattn.evaluation.quality import compare as differences
        from diffattn.files import read_json

        a, b = (QualityResult.from_dict(read_json(path)) for path in (first, second))
        found = differences(a, b, [name.strip() for name in may_differ.split(",") if name.strip()])
    stdout.print(f"A: {a.subject}\nB: {b.subject}", markup=False)
    for name, change in found.items():
        stdout.print(f"{name:<16}{a.scores[name]:12.5g}{b.scores[name]:12.5g}{change:+12.5g}", markup=False)
    write_json(json, {"a": a.to_dict(), "b": b.to_dict(), "b_minus_a": found})


@app.command("reference")
def reference(
    pictures: Annotated[Path, typer.Argument(help="A folder, a zip, or an ADM .npz.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="x.safetensors: all features; x.npz: mean and covariance as ADM's.")
    ],
    extractor: Annotated[str, typer.Option(help=f"{EXTRACTORS}.")] = "inception",
    extractor_weights: Annotated[
        str | None,
        typer.Option(help="File of inception's weights, folder of the others, or hub id.", show_default="usual place"),
    ] = None,
    num_pictures: Annotated[int | None, typer.Option(help="The first so many.", show_default="all")] = None,
    size: Annotated[
        int | None, typer.Option(help="Crop all pictures to a square and resize it.", show_default="as they are")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out.")] = False,
    device: Device = "auto",
) -> None:
    """Take the features of reference pictures once, for --reference of later evaluations.

    KID, precision, recall and, of new pictures, sFID need a .safetensors file or the pictures themselves; an .npz
    holds mu and sigma (with mu_s and sigma_s where the extractor has spatial features), which other programs read.
    """
    check_writable(out)
    with loading(str(pictures)), bad_input():
        from diffattn.evaluation.picture_set import open_pictures
        from diffattn.evaluation.references import make_reference
        from diffattn.machine import choose_device
        from diffattn.metrics.adm import write_statistics
        from diffattn.metrics.extractors import load_extractor

        if out.suffix not in (".safetensors", ".npz"):
            raise ValueError(f"a reference is saved as .safetensors or .npz, got {str(out)!r}")
        eye = load_extractor(extractor, extractor_weights, choose_device(device))
    with bad_input():
        found = open_pictures(pictures, side=size, limit=num_pictures, skip_bad=skip_bad, progress=progress)
        made, spatial = make_reference(found, eye, progress)
        if out.suffix == ".npz":
            write_statistics(out, made.statistics, spatial)
        else:
            made.save(out)
    stdout.print(f"{len(found)} pictures, {made.extractor}: written to {out}", markup=False)


def _load(
    model: str, place: Any, dtype: str, given: dict[str, Any], paired: bool
) -> tuple[Any, dict[str, Any] | None, str]:
    """The pipeline on its device, the arguments of `diffattn.patch`, and what the result calls them."""
    from diffattn.drawing.loading import load_pipeline
    from diffattn.drawing.request import EXACT
    from diffattn.machine import choose_dtype
    from diffattn.patching.default_method import default_method
    from diffattn.patching.plan import Plan
    from diffattn.patching.recipe import read_recipe

    pipe: Any = load_pipeline(model, choose_dtype(dtype, place)).to(place)
    pipe.set_progress_bar_config(disable=True)
    method, preset, options, recipe = (given[key] for key in ("method", "preset", "options", "recipe"))
    wanted = bool(method or preset or options or recipe or paired)
    if not wanted or method == EXACT:
        if paired or preset or options or recipe:
            raise ValueError(f"method {EXACT!r} has no pair, no preset, no options and no recipe")
        return pipe, None, f"{model} unaccelerated"
    found: dict[str, Any] = {"method": method or default_method(pipe), "preset": preset, **options}
    if recipe is not None:
        found["recipe"] = read_recipe(recipe)
    plan = Plan.read(found["method"], preset, found.get("recipe"), None, None, options)
    if recipe is not None and method not in (None, plan.method):
        raise ValueError(f"the recipe is for method {plan.method!r}, not {method!r}")
    words = [model, plan.method, plan.preset or "", str(recipe or ""), jsonlib.dumps(options) if options else ""]
    return pipe, found, " ".join(word for word in words if word)


def _run(subject: Any, reference: Any, *, npz: Path | None, **given: Any) -> Any:
    from diffattn.evaluation import evaluate as measure

    try:
        return measure(subject, reference, npz=npz, progress=progress, **given)
    except ValueError as error:
        fail(str(error))


def _show(result: Any) -> None:
    """The scores, then what was left out and why."""
    stdout.print(f"{result.subject}: {result.protocol.num_pictures} pictures", markup=False)
    if "fid" in result.scores:
        stdout.print(result.label, markup=False)
    for name, value in result.scores.items():
        stdout.print(f"{name:<16}{value:12.5g}", markup=False)
    for name, why in result.details.get("left_out", {}).items():
        stdout.print(f"no {name}: {why}", markup=False)
    if result.details.get("domain"):
        stdout.print(f"the extractor knows {result.details['domain']} only: its figures mean nothing for others",
                     markup=False)  # fmt: skip
