"""Mediators against softmax: FID, KID, accuracy, GFLOPs and time of trained SiTs, drawn with the same seeds.

    python pipelines/compare_mediators.py --softmax outputs/softmax/pipeline --elastic outputs/elastic/pipeline \\
        --reference cifar10-test.zip --samples 10000 --out samples/cifar-sit

Variants: the softmax model; the elastic model at each of its numbers of mediators, and with a schedule by noise level
("dynamic": the smallest number above 0.7, the middle one above 0.4, the largest below); with --recipe also with the
schedule of a recipe from `diffattn tune`, by the latents' change ("tuned"); and block caching, where cache-dit is
installed: all blocks but the first are computed in every second or third step only, their contribution is kept for the
steps between (FORA; Selvaraju et al., 2024), of the softmax model and of the elastic one at its middle number. With
--repeats every variant is drawn and scored several times, with new seeds, which shows what the seeds alone do to a
figure. Results go to comparison.json, comparison.md, grid.png and, for the schedules, switches.png; a variant that is
already in comparison.json is not drawn again. If its weights or protocol differ, the program refuses.

Without --reference, only times are measured (times.json), at --sizes: they do not depend on what a model has learned.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from PIL import Image

from diffattn import patch
from diffattn.benchmarks.plots import style_of_number
from diffattn.data import open_dataset
from diffattn.drawing.sizes import default_size
from diffattn.evaluation.quality import QualityResult, compare
from diffattn.evaluation.sit_quality import Drawing, draw_classes, sit_quality
from diffattn.files import write_json
from diffattn.machine import choose_dtype, describe_machine
from diffattn.measure.flops import count_gflops, forward_gflops
from diffattn.measure.interleave import interleave
from diffattn.metrics.extractors import FeatureExtractor, load_extractor, weights_hash
from diffattn.metrics.reference import Reference
from diffattn.patching.recipe import read_recipe
from diffattn.sampling import SiTPipeline
from diffattn.training.samples import tile

DYNAMIC = {0.7: {"num_mediators": "min"}, 0.4: {"num_mediators": "mid"}, 0.0: {"num_mediators": "max"}}


@dataclass
class Variant:
    """One way to draw."""

    name: str
    pipe: SiTPipeline
    num_mediators: int | None = None
    schedule: Mapping[Any, Any] | None = None
    cached: int | None = None  # all blocks but the first run in every such step

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the pipeline draw this way within the block."""
        if self.num_mediators:
            self.pipe.transformer.set_num_mediators(self.num_mediators)
        scheduled = patch(self.pipe, "mediator", schedule=self.schedule) if self.schedule else nullcontext()
        with scheduled, block_caching(self.pipe, self.cached) if self.cached else nullcontext():
            yield

    def gflops(self, drawing: Drawing) -> float:
        """GFLOPs of one picture, all evaluations; of the first class and seed, where they depend on the picture."""
        model = self.pipe.transformer
        passes = drawing.steps * (2 if drawing.guidance != 1 else 1)
        if self.cached:
            with self.applied():
                return count_gflops(lambda: self._draw(drawing))
        if not self.schedule:
            return passes * forward_gflops(model, self.num_mediators)
        numbers = self.numbers(drawing)
        return passes * sum(forward_gflops(model, n) for n in numbers) / len(numbers)

    def numbers(self, drawing: Drawing) -> list[int]:
        """The number of mediators of each evaluation, with a schedule; of the first class and seed."""
        with self.applied():
            trace = self._draw(drawing).trace or []
        options = [call["options"][0] if isinstance(call["options"], list) else call["options"] for call in trace]
        return [entry["num_mediators"] for entry in options]

    def _draw(self, drawing: Drawing) -> Any:
        return self.pipe([0], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                         generator=torch.Generator().manual_seed(drawing.seed), output_type="latent",
                         return_trace=bool(self.schedule))  # fmt: skip


def variants(
    softmax: Path | None, elastic: Path, recipe: Path | None = None, dtype: torch.dtype = torch.float32
) -> list[Variant]:
    """The softmax model, the elastic one at every number and with schedules, and both with cached blocks."""
    pipe = load(elastic, dtype)
    numbers = pipe.transformer.mediators
    found = [Variant(f"n = {n}", pipe, n) for n in numbers] + [Variant("dynamic", pipe, schedule=DYNAMIC)]
    if recipe is not None:
        found.append(Variant("tuned", pipe, schedule=tuned_schedule(recipe)))
    cached = [(f"n = {(n := numbers[len(numbers) // 2])}", pipe, n)]
    if softmax is not None:
        found.insert(0, Variant("softmax", load(softmax, dtype)))
        cached.insert(0, ("softmax", found[0].pipe, None))
    if why := why_no_caching():
        typer.echo(f"cached blocks are left out: {why}")
        return found
    return found + [Variant(f"{name}, cached {k}", owner, n, cached=k) for name, owner, n in cached for k in (2, 3)]


def tuned_schedule(recipe: Path) -> Mapping[str, Any]:
    """The schedule of a recipe for mediators; `ValueError` for another recipe."""
    found = read_recipe(recipe)
    if found.get("method") != "mediator" or not found.get("schedule"):
        raise ValueError(f"{str(recipe)!r} has no schedule of mediators; make one with diffattn tune --budget")
    return found["schedule"]


def why_no_caching() -> str | None:
    """Why cache-dit cannot be used, None if it can."""
    if find_spec("cache_dit") is None:
        return "cache-dit is not installed (pip install 'diffattn[peers]')"
    return None


@contextmanager
def block_caching(pipe: SiTPipeline, interval: int) -> Iterator[None]:
    """Run all blocks but the first only in every `interval`-th step; their output is cached for the steps between."""
    import cache_dit

    model = pipe.transformer
    adapter = cache_dit.BlockAdapter(
        pipe=pipe, transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False, has_separate_cfg=False,
    )  # fmt: skip
    # A threshold that no residual exceeds: the interval alone decides.
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_warmup_steps=0,
        max_continuous_cached_steps=interval - 1,
    )  # fmt: skip
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> SiTPipeline:
    pipe = SiTPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_ratios(
    found: list[Variant], rounds: int, drawing: Drawing, size: int | None = None
) -> dict[str, dict[str, object]]:
    """Time of one whole run of a batch over that of the first variant, interleaved; of pictures `size` pixels wide."""

    def draw(variant: Variant) -> None:
        generator = torch.Generator().manual_seed(0)
        variant.pipe([0] * drawing.batch, num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                     generator=generator, output_type="latent", width=size, height=size)  # fmt: skip

    by_name = {v.name: v for v in found}
    calls = {name: (lambda v=v: draw(v)) for name, v in by_name.items()}
    timings = interleave(calls, rounds, around=lambda name: by_name[name].applied())
    return {name: timings.time_ratio(name).to_dict() for name in by_name}


def time_alone(found: list[Variant], rounds: int, drawing: Drawing, sizes: list[int], out: Path) -> str:
    """Times at some sizes in pixels: writes times.json, and returns a table."""
    measured = {size: time_ratios(found, rounds, drawing, size) for size in sizes}
    result: dict[str, Any] = {"machine": describe_machine(found[0].pipe.device), "dtype": str(found[0].pipe.dtype)}
    result |= {"rounds": rounds, "drawing": asdict(drawing), "time_ratios": measured}
    write_json(out / "times.json", result)
    model = found[0].pipe.transformer
    cell = found[0].pipe.vae_scale_factor * model.config["patch_size"]
    heads = [f"{size}×{size} ({(size // cell) ** 2:,} tokens)" for size in sizes]
    lines = [f"| time ratio (IQR) | {' | '.join(heads)} |", "|---" * (1 + len(sizes)) + "|"]
    for variant in found:
        ratios: list[Any] = [measured[size][variant.name] for size in sizes]
        cells = [f"{r['median']:.2f} ({r['iqr'][0]:.2f}–{r['iqr'][1]:.2f})" for r in ratios]
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(found: list[Variant], drawing: Drawing) -> Image.Image:
    """A line of pictures per variant, one per class, the same seeds below each other, 128 pixels wide each."""
    lines = []
    for variant in found:
        with variant.applied():
            few = Drawing(10, drawing.steps, drawing.guidance, drawing.seed, 10)
            images = torch.cat([pictures for pictures, _ in draw_classes(variant.pipe, few)])
        how = Image.Resampling.NEAREST if images.shape[-1] < 128 else Image.Resampling.LANCZOS
        lines.append([Image.fromarray(i.permute(1, 2, 0).numpy()).resize((128, 128), how) for i in images])
    return tile(lines)


def plot_switches(numbers: Mapping[str, list[int]], path: Path) -> None:
    """The number of mediators over the evaluations, one line per schedule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (name, found) in enumerate(numbers.items()):
        style: dict[str, Any] = {"where": "mid", "label": name, **style_of_number(i)}
        axis.step(range(1, len(found) + 1), found, **style)
    every = sorted({n for found in numbers.values() for n in found})
    axis.set(xlabel="evaluation, from noise to picture", ylabel="mediators", yscale="log")
    axis.set_yticks(every, list(map(str, every)))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def scores_of(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """The scores of every repeat; results of earlier versions have one."""
    return result.get("repeats") or [result["scores"]]


def table(results: dict[str, dict], drawing: Drawing, extractor: str) -> str:
    """Figures are means over the repeats, ± is their standard deviation; of KID with one repeat, over its subsets."""
    has_repeats = any(len(scores_of(r)) > 1 for r in results.values())
    lines = [
        f"| variant |{' sets |' if has_repeats else ''} FID-{drawing.samples} ({extractor}) | KID × 10³ ± std "
        "| accuracy | GFLOPs per picture | time ratio (IQR) |",
        "|---" * (7 if has_repeats else 6) + "|",
    ]
    for name, r in results.items():
        scores, t = scores_of(r), r["time_ratio"]
        fids, kids = ([s[key] for s in scores] for key in ("fid", "kid"))
        repeats = len(scores)
        accuracy = statistics.fmean(s.get("accuracy", float("nan")) for s in scores)
        spread = statistics.stdev(kids) if repeats > 1 else scores[0]["kid_std"]
        fid = f"{statistics.fmean(fids):.2f}" + (f" ± {statistics.stdev(fids):.2f}" if repeats > 1 else "")
        lines.append(
            f"| {name} |{f' {repeats} |' if has_repeats else ''} {fid} "
            f"| {1e3 * statistics.fmean(kids):.2f} ± {1e3 * spread:.2f} "
            f"| {'–' if math.isnan(accuracy) else f'{100 * accuracy:.1f} %'} | {r['gflops']:.3g} "
            f"| {t['median']:.2f} ({t['iqr'][0]:.2f}–{t['iqr'][1]:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def _write(file: Path, device: str, done: Mapping[str, Any]) -> None:
    write_json(file, {"machine": describe_machine(torch.device(device)), "variants": done})


@dataclass(frozen=True)
class Judge:
    """How variants are scored."""

    truth: Reference
    extractor: FeatureExtractor
    drawing: Drawing
    repeats: int
    repeated: tuple[str, ...] | None = None  # the variants drawn so often, others once; None: all

    @classmethod
    def of(cls, reference: Path, size: int, extractor: FeatureExtractor, drawing: Drawing, repeats: int) -> Self:
        """With the pictures of a folder or zip as the reference, at this size."""
        real = open_dataset(str(reference), size)
        truth = Reference.of(reference.name, (real[i][0][None] for i in range(len(real))), extractor)
        return cls(truth, extractor, drawing, repeats)

    def repeats_of(self, variant: Variant) -> int:
        return self.repeats if self.repeated is None or variant.name in self.repeated else 1

    def record_of(self, variant: Variant) -> dict[str, Any]:
        """What a stored result must have been made with."""
        weights = weights_hash(variant.pipe.transformer)
        return {"weights": weights, "drawing": asdict(self.drawing), "reference": self.truth.hash}

    def scored(self, variant: Variant) -> tuple[QualityResult, list[dict[str, float]]]:
        """The result of the first repeat, and the scores of all."""
        found = []
        with variant.applied():
            for i in range(self.repeats_of(variant)):
                drawing = replace(self.drawing, seed=self.drawing.seed + i * self.drawing.samples)
                found.append(sit_quality(variant.pipe, drawing, self.truth, self.extractor, variant.name))
        return found[0], [dict(result.scores) for result in found]


def score_all(found: list[Variant], judge: Judge, file: Path, device: str) -> dict[str, dict]:
    """Score what the file lacks, adding to it after each variant.

    Raises:
        ValueError: the file has results of other weights, or of another protocol.
    """
    done = json.loads(file.read_text())["variants"] if file.is_file() else {}
    for variant in found:
        now = judge.record_of(variant)
        if variant.name in done:
            before = {key: done[variant.name].get(key) for key in now}
            if before != now or len(scores_of(done[variant.name])) != judge.repeats_of(variant):
                raise ValueError(f"{str(file)!r} has {variant.name!r} of {before}, now {now}: choose another --out")
            continue
        result, repeats = judge.scored(variant)
        for other in done.values():  # refuses results of different protocols
            compare(QualityResult.from_dict({key: other[key] for key in ("subject", "protocol", "scores")}), result)
        done[variant.name] = {**result.to_dict(), **now, "repeats": repeats, "gflops": variant.gflops(judge.drawing)}
        _write(file, device, done)
        typer.echo(f"{variant.name}: {done[variant.name]['scores']}")
    return done


def main(
    elastic: Annotated[Path, typer.Option(help="Pipeline folder of the model with mediators.")],
    reference: Annotated[Path | None, typer.Option(help="Real pictures: a zip or folder, as for training.")] = None,
    softmax: Annotated[Path | None, typer.Option(help="Pipeline folder of the softmax model.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe that diffattn tune made for the elastic model.")] = None,
    extractor: Annotated[str, typer.Option(help="Feature extractor.")] = "cifar-classifier",
    samples: Annotated[int, typer.Option(help="Pictures per variant.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: none.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Interleaved timings.")] = 9,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    repeats: Annotated[int, typer.Option(help="How often all pictures are drawn, with new seeds.", min=1)] = 1,
    repeated: Annotated[str | None, typer.Option(help="Repeat only these variants, with commas; default all.")] = None,
    timed_batch: Annotated[int | None, typer.Option(help="Pictures at once when timing; default --batch.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Pixels of timed pictures, without --reference.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these variants, with commas.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/comparison"),
) -> None:
    """Compare trained SiTs; see above."""
    drawing = Drawing(samples, steps, guidance, seed, batch)
    found = variants(softmax, elastic, recipe, choose_dtype(dtype, torch.device(device)))
    if only is not None:
        found = [variant for variant in found if variant.name in only.split(",")]
    for variant in found:
        variant.pipe.to(device)
    size = default_size(found[0].pipe)[0]
    if reference is None:
        pixels = [int(side) for side in sizes.split(",")] if sizes else [size]
        typer.echo(time_alone(found, rounds, replace(drawing, batch=timed_batch or batch), pixels, out))
        return
    judge = Judge.of(reference, size, load_extractor(extractor, device=device), drawing, repeats)
    judge = replace(judge, repeated=tuple(repeated.split(",")) if repeated else None)
    file = out / "comparison.json"
    done = score_all(found, judge, file, device)
    for name, ratio in time_ratios(found, rounds, replace(drawing, batch=timed_batch or batch)).items():
        done[name]["time_ratio"] = ratio
    _write(file, device, done)
    text = table({v.name: done[v.name] for v in found}, drawing, extractor)
    (out / "comparison.md").write_text(text)
    grid(found, drawing).save(out / "grid.png")
    if numbers := {v.name: v.numbers(drawing) for v in found if v.schedule}:
        plot_switches(numbers, out / "switches.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
