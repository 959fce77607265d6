"""The linear family against softmax and mediators: the cores alone, and trained models at equal size.

    python pipelines/compare_linear.py cores --out samples/linear-family
    python pipelines/compare_linear.py train --data cifar10-train.zip --reference cifar10-test.zip \\
        --out outputs/linear-family

`cores` times what lies between the projections at 256 to 16,384 tokens; variants take turns, ratios are of one round.
Results go to cores.json, cores.md and cores.png. `train` trains one small model for each attention, with the same
steps, data and seeds, and MLPs so wide that all have as many parameters as the softmax model; softmax and the best two
get a second seed. Results go to trained.json and trained.md. To resume an interrupted run of either, start it again
with the same arguments. Several processes may share the training of one table, each with `--subjects` of its own and
`--second-seeds 0`; a last run without either trains what is missing and times everything.
"""

from pathlib import Path
from typing import Annotated

import typer
from linear_family import cores as timing
from linear_family import training

from diffattn.evaluation.sit_quality import Drawing

app = typer.Typer(add_completion=False, no_args_is_help=True)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@app.command()
def cores(
    tokens: Annotated[str, typer.Option(help="Comma-separated squares.")] = "256,1024,4096,16384",
    mediators: Annotated[str, typer.Option(help="Comma-separated numbers of mediators.")] = "16,64",
    batch: Annotated[int, typer.Option(help="Samples in a call.")] = 2,
    width: Annotated[int, typer.Option(help="Channels.")] = 384,
    heads: Annotated[int, typer.Option(help="Heads.")] = 6,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds at each size.")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/linear-family"),
) -> None:
    """Time the cores alone, forward."""
    config = timing.CoreConfig(_numbers(tokens), _numbers(mediators), batch, width, heads, rounds, device, dtype)
    found = timing.measure(config, out / "cores.json", typer.echo)
    text = timing.table(found)
    (out / "cores.md").write_text(text)
    timing.plot(found, out / "cores.png")
    typer.echo(text)


@app.command()
def train(
    data: Annotated[str, typer.Option(help="Pictures to train on: a zip or folder, as for diffattn train.")],
    reference: Annotated[str, typer.Option(help="Real pictures to score against.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of every run, such as run.steps=500.")] = None,
    preset: Annotated[str, typer.Option(help="Of diffattn train.")] = "cifar-linear-cpu",
    subjects: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(training.SUBJECTS),
    second_seeds: Annotated[int, typer.Option(help="The best so many, and softmax, get a second seed.")] = 2,
    samples: Annotated[int, typer.Option(help="Pictures per model.")] = 2000,
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1: none.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 64,
    extractor: Annotated[str, typer.Option(help="Feature extractor.")] = "cifar-classifier",
    rounds: Annotated[int, typer.Option(help="Interleaved timings.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="In which pictures are drawn: float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("outputs/linear-family"),
) -> None:
    """Train one model for each attention at equal parameters, and score them."""
    chosen = tuple(name.strip() for name in subjects.split(","))
    if unknown := [name for name in chosen if name not in training.SUBJECTS]:
        raise typer.BadParameter(f"unknown subjects: {', '.join(unknown)}; allowed: {', '.join(training.SUBJECTS)}")
    comparison = training.Comparison(
        data, reference, out, preset, tuple(settings or ()), chosen, second_seeds,
        Drawing(samples, steps, guidance, 0, batch), extractor, rounds, device, dtype,
    )  # fmt: skip
    found = training.compare(comparison, typer.echo)
    text = training.table(found)
    (out / "trained.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    app()
