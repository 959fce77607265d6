"""Mediators against softmax: FID, KID, accuracy, GFLOPs and time of trained SiTs, drawn with the same seeds.

    python pipelines/compare_mediators.py --softmax outputs/softmax/pipeline --elastic outputs/elastic/pipeline \\
        --reference cifar10-test.zip --samples 10000 --out samples/cifar-sit

Variants: the softmax model; the elastic model at each of its numbers of mediators, and with a schedule by noise level
("dynamic": the smallest number above 0.7, the middle one above 0.4, the largest below). Results go to
comparison.json, comparison.md and grid.png; a variant that is in comparison.json already is not drawn again.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from diffattn import patch
from diffattn.evaluation.extractors import load_extractor
from diffattn.evaluation.flops import forward_gflops
from diffattn.evaluation.machine import describe_machine
from diffattn.evaluation.quality import QualityResult, compare
from diffattn.evaluation.reference import Reference
from diffattn.evaluation.sit_quality import Drawing, draw_classes, sit_quality
from diffattn.evaluation.speed import interleave
from diffattn.sampling import SiTPipeline
from diffattn.training.data import open_dataset
from diffattn.training.samples import tile

DYNAMIC = {0.7: {"num_mediators": "min"}, 0.4: {"num_mediators": "mid"}, 0.0: {"num_mediators": "max"}}


@dataclass
class Variant:
    """One way to draw."""

    name: str
    pipe: SiTPipeline
    num_mediators: int | None = None
    dynamic: bool = False

    def applied(self) -> AbstractContextManager[object]:
        """Within, the pipeline draws this way."""
        if self.num_mediators:
            self.pipe.transformer.set_num_mediators(self.num_mediators)
        return patch(self.pipe, "mediator", schedule=DYNAMIC) if self.dynamic else nullcontext()

    def gflops(self, drawing: Drawing) -> float:
        """Of one picture, all evaluations."""
        model = self.pipe.transformer
        passes = drawing.steps * (2 if drawing.guidance != 1 else 1)
        if not self.dynamic:
            return passes * forward_gflops(model, self.num_mediators)
        with self.applied():
            trace = self.pipe([0], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                              output_type="latent", return_trace=True).trace or []  # fmt: skip
        numbers = [sorted(model.mediators)[(0, len(model.mediators) // 2, -1)[call["phase"]]] for call in trace]
        return passes * sum(forward_gflops(model, n) for n in numbers) / len(numbers)


def variants(softmax: Path | None, elastic: Path) -> list[Variant]:
    """The softmax model, then the elastic one at every number, then with a schedule."""
    found = []
    if softmax is not None:
        found.append(Variant("softmax", load(softmax)))
    pipe = load(elastic)
    found += [Variant(f"n = {n}", pipe, n) for n in pipe.transformer.mediators]
    return [*found, Variant("dynamic", pipe, dynamic=True)]


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


def main(
    elastic: Annotated[Path, typer.Option(help="Pipeline folder of the model with mediators.")],
    reference: Annotated[Path, typer.Option(help="Real pictures: a zip or folder, as for training.")],
    softmax: Annotated[Path | None, typer.Option(help="Pipeline folder of the softmax model.")] = None,
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
    found = variants(softmax, elastic)
    for variant in found:
        variant.pipe.to(device)
    eye = load_extractor(extractor, device=device)
    real = open_dataset(str(reference), found[0].pipe.transformer.config["sample_size"])
    truth = Reference.of(reference.name, (real[i][0][None] for i in range(len(real))), eye)
    file = out / "comparison.json"
    done = json.loads(file.read_text())["variants"] if file.is_file() else {}
    out.mkdir(parents=True, exist_ok=True)
    for variant in found:
        if variant.name in done:
            continue
        with variant.applied():
            result = sit_quality(variant.pipe, drawing, truth, eye, variant.name)
        done[variant.name] = {**result.to_dict(), "gflops": variant.gflops(drawing)}
        file.write_text(
            json.dumps({"machine": describe_machine(torch.device(device)), "variants": done}, indent=1) + "\n"
        )
        typer.echo(f"{variant.name}: {done[variant.name]['scores']}")
    scored = [
        QualityResult.from_dict({key: done[v.name][key] for key in ("subject", "protocol", "scores")}) for v in found
    ]
    for other in scored[1:]:
        compare(scored[0], other)  # refuses results of different protocols
    for name, ratio in time_ratios(found, rounds, drawing).items():
        done[name]["time_ratio"] = ratio
    file.write_text(json.dumps({"machine": describe_machine(torch.device(device)), "variants": done}, indent=1) + "\n")
    text = table({v.name: done[v.name] for v in found}, drawing, extractor)
    (out / "comparison.md").write_text(text)
    grid(found, drawing).save(out / "grid.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
