"""`diffattn evaluate`, `diffattn evaluate compare`, `diffattn evaluate reference`."""

import json as jsonlib
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
from diffattn.cli.evaluate_results import compare, show_scores, show_worst_pairs
from diffattn.cli.options import (
    EXTRACTORS,
    Clip,
    ClipI,
    Device,
    DinoI,
    Dtype,
    EvaluatedMethod,
    ExtractorWeights,
    Guidance,
    Height,
    JsonFile,
    LpipsWeights,
    MaybeModel,
    Options,
    PickScore,
    Preset,
    Prompts,
    Recipe,
    Seed,
    Side,
    SkipBad,
    Steps,
    Variant,
    Width,
)

PICTURES = 1000  # drawn by default
OUT = Path("outputs/evaluate")
DRAWING = {"variant", "method", "preset", "option", "recipe", "paired", "steps", "guidance", "width", "height", "batch",
           "seed", "dtype"}  # fmt: skip
"""Parameters that only say how pictures are drawn."""

REFERENCE = "What to score against: a folder, a zip, an .npz (pictures, or mu and sigma), or a saved reference."
NUM_PICTURES = "How many pictures to draw, or to take from those given, with a share from every folder."
SPREAD = "How many to take, spread evenly over the classes."
PAIRED_WITH = "Compare with these pictures instead, matched by name or number, otherwise in order."
WORST_PAIRS = "How many of the worst pairs to show on a sheet, worst_pairs.png in the folder; 0: no sheet."
PAIRED = "Also draw the same seeds unaccelerated, for PSNR, SSIM and latent error."
PICTURES_GIVEN = "Score these pictures instead: a folder, a zip, or an ADM .npz."
EXTRACTOR = f"{EXTRACTORS}; auto: the embedded model's own, otherwise inception."
SAVE_NPZ = "Also write the pictures as an ADM .npz."

app = typer.Typer(
    help="Score pictures, or what a pipeline draws, against pictures, prompts, or the unaccelerated pipeline.",
    invoke_without_command=True,
)


@app.callback()
def evaluate(
    context: typer.Context,
    model: MaybeModel = None,
    variant: Variant = None,
    pictures: Annotated[Path | None, typer.Option(help=PICTURES_GIVEN)] = None,
    reference: Annotated[Path | None, typer.Option(help=REFERENCE)] = None,
    prompts: Prompts = None,
    num_pictures: Annotated[int | None, typer.Option(help=NUM_PICTURES, show_default="1000 drawn; all given")] = None,
    method: EvaluatedMethod = None,
    preset: Preset = None,
    option: Options = None,
    recipe: Recipe = None,
    paired: Annotated[bool, typer.Option("--paired", help=PAIRED)] = False,
    paired_with: Annotated[Path | None, typer.Option(metavar="PATH", help=PAIRED_WITH)] = None,
    extractor: Annotated[str, typer.Option(help=EXTRACTOR)] = "auto",
    extractor_weights: ExtractorWeights = None,
    clip: Clip = None,
    pickscore: PickScore = None,
    clip_i: ClipI = None,
    dino_i: DinoI = None,
    lpips_weights: LpipsWeights = None,
    worst_pairs: Annotated[int, typer.Option(help=WORST_PAIRS)] = 6,
    show: Annotated[bool, typer.Option("--show", help="Open that sheet in the system's picture viewer.")] = False,
    size: Side = None,
    skip_bad: SkipBad = False,
    steps: Steps = 25,
    guidance: Guidance = None,
    width: Width = None,
    height: Height = None,
    batch: Annotated[int, typer.Option(help="Pictures per call of the pipeline.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run in it can be resumed.")] = OUT,
    save_npz: Annotated[Path | None, typer.Option(metavar="FILE", help=SAVE_NPZ)] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Score pictures, or what a pipeline draws. Every result carries its protocol.

    With --reference: FID, KID, FID for infinitely many pictures, precision, recall, and sFID where the extractor has
    spatial features. With --prompts: CLIP score (--clip), PickScore (--pickscore). With --paired or --paired-with:
    PSNR (also of the foreground), SSIM, LPIPS (--lpips-weights), CLIP-I (--clip-i), DINO-I (--dino-i), and a sheet of
    the worst pairs to look at. Several processes share the work under `accelerate launch -m diffattn`.
    """
    if context.invoked_subcommand is not None:
        return
    check_writable(out, folder=True)
    for file, other in ((json, save_npz), (save_npz, json)):
        check_writable(file)
        check_apart(file, out, other)
    with loading(model or str(pictures)), bad_input():
        from diffattn.evaluation import EvaluateConfig, load_prompts
        from diffattn.evaluation.run_folder import processes
        from diffattn.machine import choose_device

        if (model is None) == (pictures is None):
            raise ValueError("give either --model (to draw pictures) or --pictures")
        if paired and paired_with is not None:
            raise ValueError("give either --paired or --paired-with")
        if model is None:
            _refuse_drawing(context)
        among, place = processes(choose_device(device))
        words = None if prompts is None else load_prompts(prompts)
        config = EvaluateConfig(
            extractor=_extractor(extractor, model), extractor_weights=extractor_weights, clip=clip, pickscore=pickscore,
            clip_i=clip_i, dino_i=dino_i, lpips_weights=lpips_weights, side=size, skip_bad=skip_bad, prompts=words,
            limit=num_pictures if model is None else None, device=place, worst_pairs=worst_pairs,
        )  # fmt: skip
        given = {"method": method, "preset": preset, "options": read_options(option or []), "recipe": recipe,
                 "variant": variant}  # fmt: skip
        sampling = {"num_pictures": num_pictures, "prompts": words, "steps": steps, "guidance": guidance,
                    "width": width, "height": height, "seed": seed, "batch": batch}  # fmt: skip
        subject, draw, acceleration, name = _subject(model, pictures, place, dtype, given, sampling, paired)
    result = _run(subject, reference, folder=out, config=config, draw=draw, acceleration=acceleration,
                  paired=paired_with or paired, name=name, npz=save_npz)  # fmt: skip
    if among.is_main:
        write_json(json, result.to_dict())
        _show(result, subject, guidance, out, show)
    if result.details.get("not_finite"):
        raise typer.Exit(1)


def _show(result: Any, subject: Any, guidance: float | None, out: Path, show: bool) -> None:
    """Print the scores, and the worst pairs; open their sheet if asked to."""
    from diffattn.drawing.classes import unguided_note

    show_scores(result)
    if note := unguided_note(subject, guidance):
        stdout.print(note, markup=False)
    show_worst_pairs(result, out, show)
    stdout.print(f"written to {out / 'result.json'}", markup=False)


app.command("compare")(compare)


@app.command("reference")
def reference(
    pictures: Annotated[Path, typer.Argument(help="A folder, a zip, or an ADM .npz.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="x.safetensors: all features; x.npz: mean and covariance, as in ADM.")
    ],
    extractor: Annotated[str, typer.Option(help=f"{EXTRACTORS}.")] = "inception",
    extractor_weights: ExtractorWeights = None,
    num_pictures: Annotated[int | None, typer.Option(help=SPREAD, show_default="all")] = None,
    size: Side = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
) -> None:
    """Compute the features of reference pictures once, to pass as --reference in later evaluations.

    KID, precision and recall (and sFID, with an extractor that has spatial features) need a .safetensors file or the
    pictures themselves. An .npz holds mu and sigma (and mu_s and sigma_s for spatial features) for other programs.
    """
    check_writable(out)
    with loading(str(pictures)), bad_input():
        from diffattn.evaluation.picture_set import open_pictures
        from diffattn.evaluation.references import make_reference
        from diffattn.machine import choose_device
        from diffattn.metrics.adm import write_statistics
        from diffattn.metrics.extractors import load_extractor

        if out.suffix not in (".safetensors", ".npz"):
            raise ValueError(f"a reference must be saved as .safetensors or .npz, got {str(out)!r}")
        eye = load_extractor(extractor, extractor_weights, choose_device(device))
    with bad_input():
        found = open_pictures(
            pictures, side=size, limit=num_pictures, spread=True, skip_bad=skip_bad, progress=progress
        )
        made, spatial = make_reference(found, eye, progress)
        if out.suffix == ".npz":
            write_statistics(out, made.statistics, spatial)
        else:
            made.save(out)
    stdout.print(f"{len(found)} pictures, {made.extractor}: written to {out}", markup=False)


def _extractor(name: str, model: str | None) -> str:
    """The extractor of this name; "auto" is the embedded model's own, otherwise inception."""
    from diffattn.drawing.loading import EMBEDDED

    own = EMBEDDED[model].extractor if model in EMBEDDED else None
    if name in {known.extractor for known in EMBEDDED.values()} and own not in (None, name):
        raise ValueError(
            f"scores of extractor {name!r} are meaningless for pictures of {model!r}; use its own, {own!r}"
        )
    return (own or "inception") if name == "auto" else name


def _refuse_drawing(context: typer.Context) -> None:
    """Raise `ValueError` for given options that only say how pictures are drawn."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in DRAWING and getattr(context.get_parameter_source(parameter.name), "name", "") != "DEFAULT"
    ]
    if given:
        raise ValueError(f"--pictures are not drawn: leave out {', '.join(given)}, or give --model instead")


def _subject(
    model: str | None,
    pictures: Path | None,
    place: Any,
    dtype: str,
    given: dict[str, Any],
    sampling: dict[str, Any],
    paired: bool,
) -> tuple[Any, Any, dict[str, Any] | None, str | None]:
    """What is scored, how it is drawn, the arguments of `diffattn.patch`, and what the result calls them."""
    from diffattn.drawing.draw import guidance_for
    from diffattn.evaluation import DrawConfig

    if model is None:
        return pictures, DrawConfig(), None, None
    subject, acceleration, name = _load(model, place, dtype, given, paired)
    if sampling["num_pictures"] is None:
        sampling["num_pictures"] = PICTURES
    sampling["guidance"] = guidance_for(subject, sampling["guidance"], model)
    return subject, DrawConfig(**sampling), acceleration, name


def _load(
    model: str, place: Any, dtype: str, given: dict[str, Any], paired: bool
) -> tuple[Any, dict[str, Any] | None, str]:
    """The pipeline on its device, the arguments of `diffattn.patch`, and what the result calls them."""
    from diffattn.drawing.loading import load_pipeline
    from diffattn.drawing.request import UNPATCHED
    from diffattn.machine import choose_dtype
    from diffattn.patching.default_method import default_method
    from diffattn.patching.plan import Plan
    from diffattn.patching.recipe import read_recipe

    pipe: Any = load_pipeline(model, choose_dtype(dtype, place), given["variant"]).to(place)
    pipe.set_progress_bar_config(disable=True)
    method, preset, options, recipe = (given[key] for key in ("method", "preset", "options", "recipe"))
    wanted = bool(method or preset or options or recipe or paired)
    if not wanted or method == UNPATCHED:
        if paired or preset or options or recipe:
            raise ValueError(f"method {UNPATCHED!r} takes no --paired, preset, options or recipe")
        return pipe, None, f"{model} unaccelerated"
    own = {} if recipe is None else {"recipe": read_recipe(recipe)}
    found = {"method": method or default_method(pipe), "preset": preset, **own}
    plan = Plan.read(found["method"], preset, found.get("recipe"), None, None, options)
    if recipe is not None and method not in (None, plan.method):
        raise ValueError(f"the recipe is for method {plan.method!r}, not {method!r}")
    words = [model, plan.method, plan.preset or "", str(recipe or ""), jsonlib.dumps(options) if options else ""]
    return pipe, found | options, " ".join(word for word in words if word)


def _run(subject: Any, reference: Any, *, npz: Path | None, **given: Any) -> Any:
    from diffattn.evaluation import evaluate as measure

    try:
        return measure(subject, reference, npz=npz, progress=progress, **given)
    except ValueError as error:
        fail(str(error))
