"""Mediators against softmax: FID, KID, accuracy, GFLOPs and time of trained SiTs, drawn with the same seeds.

    python pipelines/compare_mediators.py --softmax outputs/softmax/pipeline --elastic outputs/elastic/pipeline \\
        --reference cifar10-test.zip --samples 10000 --out samples/cifar-sit

Variants: the softmax model; the elastic model at each of its numbers of mediators, and with a schedule by noise level
("dynamic": the smallest number above 0.7, the middle one above 0.4, the largest below); with --recipe also with the
schedule of a recipe from `diffattn tune`, by the latents' change ("tuned"); and block caching, where cache-dit is
installed: all blocks but the first are computed in every second or third step only, their contribution is kept for the
steps between (FORA; Selvaraju et al., 2024), of the softmax model and of the elastic one at its middle number. Results
go to comparison.json, comparison.md and grid.png; a variant that is already in comparison.json is not drawn again. If
its weights or protocol differ, the program refuses.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from diffattn import patch
from diffattn.data import open_dataset
from diffattn.evaluation.quality import QualityResult, compare
from diffattn.evaluation.sit_quality import Drawing, draw_classes, sit_quality
from diffattn.files import write_json
from diffattn.machine import describe_machine
from diffattn.measure.flops import count_gflops, forward_gflops
from diffattn.measure.interleave import interleave
from diffattn.metrics.extractors import load_extractor, weights_hash
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
        if not self.schedule and not self.cached:
            return passes * forward_gflops(model, self.num_mediators)

        def draw() -> Any:
            return self.pipe([0], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                             generator=torch.Generator().manual_seed(drawing.seed), output_type="latent",
                             return_trace=bool(self.schedule))  # fmt: skip

        with self.applied():
            if self.cached:
                return count_gflops(draw)
            trace = draw().trace or []
        options = [call["options"][0] if isinstance(call["options"], list) else call["options"] for call in trace]
        numbers = [entry["num_mediators"] for entry in options]
        return passes * sum(forward_gflops(model, n) for n in numbers) / len(numbers)


def variants(softmax: Path | None, elastic: Path, recipe: Path | None = None) -> list[Variant]:
    """The softmax model, the elastic one at every number and with schedules, and both with cached blocks."""
    pipe = load(elastic)
    numbers = pipe.transformer.mediators
    found = [Variant(f"n = {n}", pipe, n) for n in numbers] + [Variant("dynamic", pipe, schedule=DYNAMIC)]
    if recipe is not None:
        found.append(Variant("tuned", pipe, schedule=tuned_schedule(recipe)))
    cached = [(f"n = {(n := numbers[len(numbers) // 2])}", pipe, n)]
    if softmax is not None:
        found.insert(0, Variant("softmax", load(softmax)))
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


def load(folder: Path) -> SiTPipeline:
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_ratios(found: list[Variant], rounds: int, drawing: Drawing) -> dict[str, dict[str, object]]:
    """Time of one whole run of a batch over that of the first variant, interleaved."""

    def draw(variant: Variant) -> None:
        variant.pipe([0] * drawing.batch, num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                     generator=torch.Generator().manual_seed(0), output_type="latent")  # fmt: skip

    by_name = {v.name: v for v in found}
    calls = {name: (lambda v=v: draw(v)) for name, v in by_name.items()}
    timings = interleave(calls, rounds, around=lambda name: by_name[name].applied())
    return {name: timings.time_ratio(name).to_dict() for name in by_name}


def grid(found: list[Variant], drawing: Drawing) -> Image.Image:
    """A line of pictures per variant, one per class, the same seeds below each other, enlarged four times."""
    lines = []
    for variant in found:
        with variant.applied():
            few = Drawing(10, drawing.steps, drawing.guidance, drawing.seed, 10)
            images = torch.cat([pictures for pictures, _ in draw_classes(variant.pipe, few)])
        lines.append([Image.fromarray(i.permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.NEAREST)
                      for i in images])  # fmt: skip
    return tile(lines)


def table(results: dict[str, dict], drawing: Drawing, extractor: str) -> str:
    lines = [
        f"| variant | FID-{drawing.samples} ({extractor}) | KID × 10³ ± std | accuracy | GFLOPs per picture "
        "| time ratio (IQR) |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        s, t = r["scores"], r["time_ratio"]
        lines.append(
            f"| {name} | {s['fid']:.2f} | {1e3 * s['kid']:.2f} ± {1e3 * s['kid_std']:.2f} "
            f"| {100 * s.get('accuracy', float('nan')):.1f} % | {r['gflops']:.3g} "
            f"| {t['median']:.2f} ({t['iqr'][0]:.2f}–{t['iqr'][1]:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def _write(file: Path, device: str, done: Mapping[str, Any]) -> None:
    write_json(file, {"machine": describe_machine(torch.device(device)), "variants": done})


def main(
    elastic: Annotated[Path, typer.Option(help="Pipeline folder of the model with mediators.")],
    reference: Annotated[Path, typer.Option(help="Real pictures: a zip or folder, as for training.")],
    softmax: Annotated[Path | None, typer.Option(help="Pipeline folder of the softmax model.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe that diffattn tune made for the elastic model.")] = None,
    extractor: Annotated[str, typer.Option(help="Feature extractor.")] = "cifar-classifier",
    samples: Annotated[int, typer.Option(help="Pictures per variant.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: none.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Interleaved timings.")] = 9,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/comparison"),
) -> None:
    """Compare trained SiTs; see above."""
    drawing = Drawing(samples, steps, guidance, seed, batch)
    found = variants(softmax, elastic, recipe)
    for variant in found:
        variant.pipe.to(device)
    eye = load_extractor(extractor, device=device)
    real = open_dataset(str(reference), found[0].pipe.transformer.config["sample_size"])
    truth = Reference.of(reference.name, (real[i][0][None] for i in range(len(real))), eye)
    file = out / "comparison.json"
    done = json.loads(file.read_text())["variants"] if file.is_file() else {}
    for variant in found:
        now = {"weights": weights_hash(variant.pipe.transformer), "drawing": asdict(drawing), "reference": truth.hash}
        if variant.name in done:
            before = {key: done[variant.name].get(key) for key in now}
            if before != now:
                raise ValueError(f"{str(file)!r} has {variant.name!r} of {before}, now {now}: choose another --out")
            continue
        with variant.applied():
            result = sit_quality(variant.pipe, drawing, truth, eye, variant.name)
        for other in done.values():  # refuses results of different protocols
            compare(QualityResult.from_dict({key: other[key] for key in ("subject", "protocol", "scores")}), result)
        done[variant.name] = {**result.to_dict(), **now, "gflops": variant.gflops(drawing)}
        _write(file, device, done)
        typer.echo(f"{variant.name}: {done[variant.name]['scores']}")
    for name, ratio in time_ratios(found, rounds, drawing).items():
        done[name]["time_ratio"] = ratio
    _write(file, device, done)
    text = table({v.name: done[v.name] for v in found}, drawing, extractor)
    (out / "comparison.md").write_text(text)
    grid(found, drawing).save(out / "grid.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
