"""Speed and quality of an embedded model, for the page to show before anybody measured: written beside the model.

The shipped ones were made on two shared CPU cores by

    python pipelines/precompute_page.py emoji-sd --pictures noto-emoji-512.zip --every 8 --samples 16 --steps 16
    python pipelines/precompute_page.py emoji-mmdit --pictures noto-emoji-512.zip --every 8 --samples 8 --steps 16
    python pipelines/precompute_page.py emoji-sit --pictures noto-emoji-512.zip --every 8 --samples 16 --steps 16
    python pipelines/precompute_page.py cifar-sit --pictures cifar10-test.zip --most 2000 --samples 64 --threads 1

`--pictures` makes the reference (reference.safetensors) once; without it the one that is there is used, or else exact
pictures of the model with other seeds. The results are speed_quality.json. Every run replaces the one before it.
"""

import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from diffattn.app.jobs import JobProgress, Limits, Models, QualityRun, Worker
from diffattn.app.jobs.choices import accelerations
from diffattn.app.jobs.quality_run import REFERENCE_FILE, RUNS_FILE, save_runs
from diffattn.data import open_dataset
from diffattn.data.indexes import rows_of_jsonl
from diffattn.drawing.loading import EMBEDDED, embedded_folder, embedded_models
from diffattn.files import decode_text
from diffattn.machine import cpu_threads
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.reference import Reference

MEDIATORS = ["mediator/balanced", "mediator/fast"]
AGENTS = ["agent/balanced", "agent/fast"]
WAYS = {"emoji-sd": AGENTS, "emoji-mmdit": AGENTS, "emoji-sit": MEDIATORS, "cifar-sit": MEDIATORS}
NUMBERS = {"emoji-sd": "16, 64", "emoji-mmdit": "32, 128", "emoji-sit": "4, 16, 64", "cifar-sit": "4, 16, 64"}


def main(
    model: Annotated[str, typer.Argument(help="An embedded model.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder or zip of real pictures, for the reference.")] = None,
    every: Annotated[int, typer.Option(help="Take every n-th picture, beginning with the first.")] = 1,
    most: Annotated[int, typer.Option(help="Most pictures of the reference, spread evenly.")] = 5000,
    side: Annotated[int | None, typer.Option(help="Pixels of the pictures; default the model's.")] = None,
    samples: Annotated[int, typer.Option(help="N, pictures of each way to draw.")] = 202,
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 20,
    ways: Annotated[str | None, typer.Option(help="Accelerations, with commas; default by model.")] = None,
    numbers: Annotated[str | None, typer.Option(help="Numbers of agents or mediators; default by model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the page draws.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of both files; default the model's own.")] = None,
) -> None:
    """Measure, and write both files."""
    if model not in WAYS or model not in embedded_models():
        raise typer.BadParameter(f"{model!r} is no embedded model here; choose from {', '.join(WAYS)}")
    place = out or embedded_folder(model)
    worker = Worker(_ModelsBeside(beside=place), Limits(samples=100_000, calls=10**9), device, dtype)
    captions = _captions(pictures, every) if pictures and model.startswith("emoji") else {}
    if pictures:
        size = side or (Models().describe(model).size or (64,))[0]
        _reference(pictures, size, every, most, EMBEDDED[model].extractor, captions).save(place / REFERENCE_FILE)
    chosen = ways.split(",") if ways else [way for way in WAYS[model] if way in accelerations()]
    asked = worker.limits.measurement(
        [model], accelerations=chosen, numbers=NUMBERS[model] if numbers is None else numbers, samples=samples,
        steps=steps, prompts="\n".join(captions.values()), seed=seed,
    )  # fmt: skip
    with cpu_threads(threads):
        for event in worker.measure("", asked):
            if isinstance(event, JobProgress) and event.step == event.steps:
                left = f"{event.seconds_left:.0f} s left" if event.seconds_left is not None else ""
                typer.echo(f"\r{event.what}, picture {event.picture + 1} of {event.pictures}, {left}   ", nl=False)
            elif isinstance(event, QualityRun):
                save_runs([event], place / RUNS_FILE)
                typer.echo("\n" + "\n".join(_summary(event)) + f"\n{place / RUNS_FILE}")


@dataclass(frozen=True)
class _ModelsBeside(Models):
    """Models whose reference and stored runs lie in a folder of their own."""

    beside: Path = field(kw_only=True)

    def place(self, name: object) -> Path:
        """That folder."""
        return self.beside


def _captions(path: Path, every: int) -> dict[str, str]:
    """File -> text of every n-th picture of a zip in the imagefolder layout, in the order of its metadata."""
    with zipfile.ZipFile(path) as archive:
        rows = rows_of_jsonl(decode_text(archive.read("metadata.jsonl")))
    return {row["file_name"]: row["text"] for row in rows[::every]}


def _reference(path: Path, size: int, every: int, most: int, extractor: str, names: Collection[str]) -> Reference:
    """Of the named pictures, or of every n-th."""
    data = open_dataset(path, size)
    found = [i for i in range(len(data)) if data.name(i) in names] if names else list(range(0, len(data), every))
    indices = torch.tensor(found)
    if len(indices) > most:
        indices = indices[torch.linspace(0, len(indices) - 1, most).round().long()]
    chunks = (torch.stack([data[int(i)][0] for i in part]) for part in indices.split(64))
    return Reference.of(f"{path.stem}, {len(indices)} pictures", chunks, load_extractor(extractor))


def _summary(run: QualityRun) -> list[str]:
    return [
        f"{line.acceleration:>20}: {line.seconds.median:.2f} s, {line.speedup:.2f}x, {line.quality.label.split()[0]} "
        f"{line.quality.scores['fid']:.3f}, KID {line.quality.scores['kid']:.4f} ± {line.quality.scores['kid_std']:.4f}"
        for line in run.lines
    ]


if __name__ == "__main__":
    typer.run(main)
