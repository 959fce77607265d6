"""Agent attention beside other accelerations of diffusion models, and together with them.

    python pipelines/compare_peers.py quality --out outputs/peers
    python pipelines/compare_peers.py speed --unets sd15 --sizes 1024 --out outputs/peers
    python pipelines/compare_peers.py together --folder outputs/peers

`quality` draws the same prompts and seeds with every variant on emoji-sd, or on the `--model` given, which may be a
transformer, compares each picture with the unaccelerated one, and times whole runs, variants in turns. `speed` times
whole sampling runs of UNets of real sizes with random weights. Results go to quality.json, quality.md and pareto.png,
or to speed.json and speed.md; `--resume` keeps existing ones and only adds what is missing. `together` plots the
pictures of the first over the times of the second. The peers are in `pipelines/peers/`; "sada" is SADA without its
token-wise part. tomesd, DeepCache and tgate come without their dependencies:

    pip install --no-deps tomesd==0.1.3 DeepCache==0.1.1 tgate==1.0.0
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import FLOOR, SDPA, VARIANTS, Setting, check_names, report
from peers.base import self_attention
from peers.comparison import Comparison
from peers.models import LOOP, embeddings, random_pipeline
from peers.pictures import GROUPS, Drawing, builtin_prompts
from peers.results import Results, conditions

from diffattn.architectures.denoisers import denoiser_of
from diffattn.drawing.loading import load_pipeline
from diffattn.files import read_json, read_lines
from diffattn.machine import choose_device, choose_dtype, cpu_threads, dtype_name, resolve, where
from diffattn.measure.models import UNETS
from diffattn.methods.agent import AgentAttention
from diffattn.methods.thresholds import load_thresholds
from diffattn.metrics.extractors import load_extractor

app = typer.Typer(add_completion=False, help=__doc__)

DEFAULT = ",".join(VARIANTS)
LEAST_SCORED = 4  # precision and recall look at 3 neighbours
Variants = Annotated[str, typer.Option(help="Comma-separated; parts joined by +, such as agent+deepcache-3.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default as torch finds them.")]
Rounds = Annotated[int, typer.Option(min=0, help="Timed runs of every variant.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Steps of an untimed run of every variant.")]
Resume = Annotated[bool, typer.Option(help="Keep existing results in the folder and measure only what is missing.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
MinTokens = Annotated[int | None, typer.Option(help="Of the agents; default the thresholds they ship with.")]


@app.command()
def quality(
    model: Annotated[str, typer.Option(help="Embedded name, folder or hub id; draws from text.")] = "emoji-sd",
    variants: Variants = DEFAULT,
    pictures: Annotated[int, typer.Option(min=1, max=64, help="Prompts of each group: trained, held-out.")] = 16,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Instead: a text file, one prompt a line.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale, above 1.")] = 2.5,
    size: Annotated[int | None, typer.Option(help="Pixels, of square pictures; default the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the i-th has seed + i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    rounds: Rounds = 9,
    timed: Annotated[int, typer.Option(min=1, help="Pictures at once in a timed run.")] = 1,
    warm_up: WarmUp = 2,
    kid_pictures: Annotated[int, typer.Option(help="Pictures for KID and FID, 4 or more; 0: not scored.")] = 0,
    reference: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Real pictures: a zip with metadata.jsonl.")
    ] = None,
    scored: Annotated[str | None, typer.Option(help="Variants that are scored; default all.")] = None,
    seed_sets: Annotated[
        int, typer.Option(min=1, help="Sets of seeds for which exact attention is scored, to measure chance.")
    ] = 3,
    every: Annotated[int, typer.Option(min=1, help="The model was trained on every n-th name of the zip.")] = 8,
    extractor: Annotated[str, typer.Option(help="Feature extractor for KID and FID.")] = "emoji-classifier",
    levels: Annotated[
        str | None, typer.Option(help="Resolutions that ToMe, downsampling and tiles change; default the upper two.")
    ] = None,
    min_tokens: MinTokens = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Threads = None,
    resume: Resume = False,
    out: Out = Path("outputs/peers"),
) -> None:
    """Pictures beside the unaccelerated ones, and the time they take."""
    names = _names(variants)
    to_score = names if scored is None else _names(scored)
    _check_quality(kid_pictures, reference, guidance)
    groups = {g: builtin_prompts(g)[:pictures] for g in GROUPS} if prompts is None else {"held-out": _lines(prompts)}
    drawing = Drawing(steps, guidance, seed, batch, size)
    place = choose_device(device)
    eye = load_extractor(extractor, device=place) if reference is not None else None
    with cpu_threads(threads):
        pipe: Any = load_pipeline(model, choose_dtype(dtype, place)).to(place)
        pipe.set_progress_bar_config(disable=True)
        denoiser = denoiser_of(pipe)
        setting = Setting(_levels_of(denoiser, levels), steps, min_tokens)
        protocol = {
            "model": model,
            "prompts": groups,
            "first_seed": seed,
            "batch": batch,
            "timed_pictures": timed,
            "size": size or "the model's own",
            "sampler": type(pipe.scheduler).__name__,
            "guidance": guidance,
            "levels": list(setting.levels),
            "scored_pictures": kid_pictures,
            "reference": reference and reference.name,
            "reference_sha256": reference and _digest(reference.read_bytes()),
            "every": every if reference else None,
            "extractor": eye and extractor,
            **_protocol(setting, place, denoiser.dtype),
        }
        results = _results(out / "quality.json", conditions(place, protocol, sys.argv), resume)
        what = f"{model} at {size} px" if size else model
        entry = results.entry(model, title=f"{what}, {steps} steps, ToMe, keys and tiles at {_levels(setting)}")
        comparison = Comparison(results, entry, names, pipe, setting, typer.echo)
        comparison.draw(groups, drawing)
        if reference is not None and eye is not None:
            comparison.score(to_score, drawing, reference, every, eye, kid_pictures, seed_sets)
        prompt = groups[GROUPS[-1]][:1]
        comparison.time(lambda: drawing.arguments(prompt, 0, timed), rounds, place, warm_up)
    if entry["rounds"]:
        report.plot(entry, f"{entry['title']}, {where(results.data['machine'])}", out / "pareto.png")
    _write(results, out / "quality.md")


@app.command()
def speed(
    unets: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(UNETS)}.")] = "sd15,sdxl",
    sizes: Annotated[str, typer.Option(help="Pixels, of square pictures; comma-separated.")] = "1024",
    variants: Variants = f"{DEFAULT},{FLOOR}",
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run; 6: two periods of DeepCache's 3.")] = 6,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures at once; guidance doubles the batch.")] = 1,
    rounds: Rounds = 3,
    warm_up: WarmUp = 2,
    min_tokens: MinTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    resume: Resume = False,
    out: Out = Path("outputs/peers"),
) -> None:
    """Times of whole sampling runs, without text encoder and VAE, on UNets with random weights.

    Runs are short because exact attention at 1024 pixels takes long on a CPU. How six steps represent 20: DeepCache
    with interval 3 has 2 full steps (7 of 20); T-GATE has guidance in 2 (8 of 20) and never re-uses self-attention (3
    of 20), so it appears a little slow. Variants that six steps cannot represent are left out, with the reason. Of SADA
    only the times in `quality` count: it skips where the trajectory is stable, and that of random weights need not be.
    Agents accelerate every layer above their thresholds, at 1024 pixels some of level 2 too.
    """
    names = _names(variants)
    wanted = [name for name in unets.split(",") if name]
    if unknown := set(wanted) - set(UNETS):
        raise typer.BadParameter(f"unknown UNet {', '.join(sorted(unknown))}; allowed: {', '.join(UNETS)}")
    place, precision = resolve(device, dtype)
    with cpu_threads(threads):
        protocol = {"pictures": pictures, **LOOP, **_protocol(Setting((), steps, min_tokens), place, precision)}
        results = _results(out / "speed.json", conditions(place, protocol, sys.argv), resume)
        for name in wanted:
            pipe = random_pipeline(UNETS[name], place, precision)
            setting = Setting(UNETS[name].levels, steps, min_tokens)
            for pixels in _numbers(sizes):
                about = f"runs of {steps} steps, ToMe, keys, tiles and floor at {_levels(setting)}"
                title = f"{UNETS[name].title}, {pixels} px, {about}"
                entry = results.entry(f"{name} {pixels}", title=title)
                typer.echo(title)
                comparison = Comparison(results, entry, names, pipe, setting, typer.echo)
                comparison.time(partial(embeddings, pipe, pixels, pictures), rounds, place, warm_up)
                _write(results, out / "speed.md")
            del pipe


@app.command()
def together(
    unet: Annotated[str, typer.Option(help="Entry of speed.json: a UNet and its size in pixels.")] = "sd15 1024",
    folder: Annotated[Path, typer.Option(help="Where quality.json and speed.json are.")] = Path("outputs/peers"),
) -> None:
    """One plot: the pictures of one model over the times of a larger one, where attention weighs more."""
    drawn, timed = (read_json(folder / f"{name}.json")["entries"] for name in ("quality", "speed"))
    if unet not in timed:
        raise typer.BadParameter(f"no times of {unet!r}; there are: {', '.join(timed)}")
    (model, entry), *_ = drawn.items()
    caption = f"Pictures of {model}; times of {timed[unet]['title']}"
    report.plot(entry, caption, folder / "pareto-large.png", timed[unet]["rounds"])
    typer.echo(f"written to {folder / 'pareto-large.png'}")


def _check_quality(kid_pictures: int, reference: Path | None, guidance: float) -> None:
    if bool(kid_pictures) != bool(reference):
        raise typer.BadParameter("--kid-pictures and --reference go together")
    if kid_pictures and kid_pictures < LEAST_SCORED:
        raise typer.BadParameter(f"--kid-pictures must be {LEAST_SCORED} or more, got {kid_pictures}")
    if guidance <= 1:
        raise typer.BadParameter("guidance must be above 1: T-GATE needs it")


def _levels_of(denoiser: Any, asked: str | None) -> tuple[int, ...]:
    here = sorted({spec.level for spec, _ in self_attention(denoiser)})
    if asked is None:
        return tuple(level for level in here if level <= 1)
    found = _numbers(asked)
    if wrong := set(found) - set(here):
        raise typer.BadParameter(f"no self-attention at level {', '.join(map(str, sorted(wrong)))}; there is at {here}")
    return found


def _results(path: Path, made: Mapping[str, Any], resume: bool) -> Results:
    try:
        return Results(path, made, resume)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _protocol(setting: Setting, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The protocol of both modes. The digest of the agents reveals presets and thresholds that have changed since."""
    presets = {name: asdict(preset) for name, preset in AgentAttention.presets.items()}
    agents = {"defaults": asdict(AgentAttention()), "presets": presets, "thresholds": load_thresholds()}
    return {
        "steps": setting.steps,
        "agents_from_tokens": "thresholds" if setting.min_tokens is None else setting.min_tokens,
        "agents_sha256": _digest(json.dumps(agents, sort_keys=True).encode()),
        "device": str(device),
        "dtype": dtype_name(dtype),
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _levels(setting: Setting) -> str:
    return "levels " + " and ".join(map(str, setting.levels))


def _write(results: Results, path: Path) -> None:
    results.save()
    text = report.markdown(results.data)
    path.write_text(text)
    typer.echo(text)


def _names(text: str) -> list[str]:
    """Variants with exact attention first, whether it was named or not."""
    names = list(dict.fromkeys((SDPA, *(name for name in text.split(",") if name))))
    try:
        check_names(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise typer.BadParameter(f"whole numbers, comma-separated, got {text!r}") from None


def _lines(path: Path) -> list[str]:
    found = [line.strip() for line in read_lines(path) if line.strip()]
    if not found:
        raise typer.BadParameter(f"{str(path)!r} holds no prompts")
    return found


if __name__ == "__main__":
    app()
