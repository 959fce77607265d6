"""Train the two small classifiers whose features serve FID and KID without a network.

    python pipelines/train_classifiers.py cifar --train cifar10-train.zip --test cifar10-test.zip --minutes 20
    python pipelines/train_classifiers.py emoji --data noto-emoji-512.zip --minutes 6

Repeat the command to resume a killed run; after a finished run it measures and exports once more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from classifiers import cards
from classifiers.augment import BatchOf, drawing_batches, photo_batches
from classifiers.data import Labelled, fingerprint, load, split_classes
from classifiers.export import export, measure, write_card
from classifiers.loop import Recipe, train
from classifiers.whitening import whitening_filters
from torch.utils.flop_counter import FlopCounterMode
from training_loop import Budget, Progress

from diffattn.machine import describe_machine, where
from diffattn.metrics.classifier import Classifier

CIFAR = {"input_size": 32, "widths": (64, 128, 256), "stem_filters": 24, "domain": "CIFAR-10"}
EMOJI = {"input_size": 48, "widths": (32, 64, 128), "stem_filters": 24, "domain": "Noto Emoji on white"}
EMOJI_CACHED = 64  # side of the pictures that the augmented 48×48 ones are cut from
HELD_OUT = 6  # every 6th picture of a class


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    work: Path  # decoded pictures and checkpoints
    out: Path  # the exported model


def build(job: Job, options: dict[str, Any], data: Labelled) -> Classifier:
    """Fresh weights from the seed; the stem from the pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(job.recipe.seed)
        model = Classifier(num_classes=len(data.names), class_names=data.names, **options)
    model.stem.weight.data.copy_(whitening_filters(data.images, options["stem_filters"]))
    return model.to(job.recipe.device, memory_format=torch.channels_last)  # type: ignore[arg-type]


def run(job: Job, model: Classifier, batches: BatchOf, name: str) -> tuple[Classifier, dict[str, Any]]:
    """Train and export. → the model loaded from its folder, and the facts about the run"""
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        size = model.config["input_size"]
        model.eval()(torch.zeros(1, 3, size, size, device=job.recipe.device))
    print(f"{name}: {counted.get_total_flops() / 1e6:.0f} MFLOP per picture")
    progress = train(model, batches, job.recipe, job.work / f"{name}.pt")
    exported = export(model, job.out)
    return exported, describe(job, exported, progress, counted.get_total_flops())


def describe(job: Job, model: Classifier, progress: Progress, flops: int) -> dict[str, Any]:
    machine = describe_machine(torch.device(job.recipe.device))
    samples = progress.samples
    return {
        **{k: v for k, v in asdict(job.recipe).items() if k not in ("log_every", "save_every", "budget")},
        "warmup_percent": round(100 * job.recipe.warmup),
        "second_descent": "".join(
            f" At step {step:,} a larger budget took the rate up to {rate:.3f} again." for step, rate in progress.raised
        ),
        "steps": progress.step, "samples": samples, "seconds": round(progress.seconds, 1),
        "pictures_per_second": round(samples / max(progress.seconds, 1e-9), 1),
        "parameters": sum(p.numel() for p in model.parameters()), "mflops": round(flops / 1e6, 1),
        "weight_bytes": sum(p.stat().st_size for p in job.out.glob("*.safetensors")),
        "num_features": model.num_features, "input_size": model.config["input_size"],
        "classes": model.config["num_classes"], "hardware": where(machine), "machine": machine,
    }  # fmt: skip


def finish(job: Job, figures: dict[str, Any], card: str) -> None:
    write_card(job.out, figures, card)
    print(json.dumps({k: v for k, v in figures.items() if k not in ("machine", "augmentation")}, indent=2))


app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Work = Annotated[Path, typer.Option(help="Folder of decoded pictures and checkpoints; an unfinished run is resumed.")]
Out = Annotated[Path, typer.Option(help="Folder of the exported model.")]
Minutes = Annotated[float, typer.Option(help="Budget of training in minutes, without reading the pictures.")]
Steps = Annotated[int | None, typer.Option(help="Budget in steps, instead of minutes.")]
Batch = Annotated[int, typer.Option(help="Pictures per step.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
SaveSeconds = Annotated[float, typer.Option(help="Seconds between checkpoints; 0: every step.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, shuffles and augmentation.")]


@app.command()
def cifar(
    train_zip: Annotated[Path, typer.Option("--train", help="Training pictures.", exists=True, dir_okay=False)],
    test_zip: Annotated[Path, typer.Option("--test", help="Test pictures.", exists=True, dir_okay=False)],
    out: Out = Path("diffattn/assets/cifar-classifier"),
    work: Work = Path("outputs/classifiers"),
    minutes: Minutes = 20,
    steps: Steps = None,
    batch: Batch = 128,
    lr: LearningRate = 0.1,
    save_seconds: SaveSeconds = 60,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Ten classes of 32×32 photographs; accuracy on the test pictures."""
    job = Job(_recipe(minutes, steps, batch, lr, save_seconds, device, seed), work, out)
    trained, tested = (load(path, CIFAR["input_size"], "label", work) for path in (train_zip, test_zip))
    model, figures = run(job, build(job, CIFAR, trained), photo_batches(trained, batch, seed), "cifar")
    figures |= measure(model, tested, "test")
    figures |= measure(model, trained.select(torch.arange(0, len(trained), 5)), "train")
    figures |= {
        "epochs": figures["samples"] / len(trained), "data": train_zip.name, "data_sha256": fingerprint(trained),
        "augmentation": "Pictures are shifted by up to 2 pixels and mirrored every other epoch.",
        "command": _command("cifar", f"--train {train_zip.name} --test {test_zip.name}", minutes, steps, seed),
    }  # fmt: skip
    finish(job, figures, cards.CIFAR)


@app.command()
def emoji(
    data_zip: Annotated[Path, typer.Option("--data", help="Captioned emoji.", exists=True, dir_okay=False)],
    out: Out = Path("diffattn/assets/emoji-classifier"),
    work: Work = Path("outputs/classifiers"),
    minutes: Minutes = 6,
    steps: Steps = None,
    batch: Batch = 128,
    lr: LearningRate = 0.1,
    save_seconds: SaveSeconds = 60,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Subgroups of emoji on white; accuracy on pictures held out."""
    job = Job(_recipe(minutes, steps, batch, lr, save_seconds, device, seed), work, out)
    data = load(data_zip, EMOJI_CACHED, "subgroup", work)
    trained, tested = (data.select(index) for index in split_classes(data.labels, HELD_OUT))
    model, figures = run(job, build(job, EMOJI, trained), drawing_batches(trained, batch, seed, 48), "emoji")
    figures |= measure(model, tested, "held_out") | measure(model, trained, "train")
    commonest = (tested.labels == trained.labels.mode().values).float().mean().item()
    figures |= {
        "held_out_every": HELD_OUT, "held_out_classes": len(tested.labels.unique()),
        "commonest_percent": round(100 * commonest, 2),
        "epochs": figures["samples"] / len(trained), "data": data_zip.name, "data_sha256": fingerprint(data),
        "augmentation": "Drawings are turned, scaled, moved, mirrored, and their colours changed; white stays white.",
        "command": _command("emoji", f"--data {data_zip.name}", minutes, steps, seed),
    }  # fmt: skip
    finish(job, figures, cards.EMOJI)


def _recipe(
    minutes: float, steps: int | None, batch: int, lr: float, save_seconds: float, device: str, seed: int
) -> Recipe:
    if minutes <= 0 or (steps is not None and steps < 1) or batch < 2:
        raise typer.BadParameter("the budget must be positive, and a batch at least two pictures")
    budget = Budget(minutes=minutes) if steps is None else Budget(steps=steps)
    return Recipe(budget, batch=batch, lr=lr, seed=seed, device=device, save_every=save_seconds)


def _command(name: str, data: str, minutes: float, steps: int | None, seed: int) -> str:
    budget = f"--minutes {minutes:g}" if steps is None else f"--steps {steps}"
    return f"python pipelines/train_classifiers.py {name} {data} {budget} --seed {seed}"


if __name__ == "__main__":
    app()
