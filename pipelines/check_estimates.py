"""Compares the page's estimates of durations with those of its jobs.

    python pipelines/check_estimates.py emoji-sd --runs 4 --out outputs/estimates.json

The page's estimate is recorded before every job, then the job runs: pictures of every size, `--runs` times each and
once with twice the steps, then sizes that were not drawn before, and comparisons. From the second job of a kind on, an
estimate should be within 30 % of the duration.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.app.jobs import Limits, Worker
from diffattn.files import write_json
from diffattn.machine import cpu_threads, describe_machine
from diffattn.tables import text_table

PROMISED = 0.3  # share of the time


@dataclass(frozen=True)
class Job:
    """One job and its estimate."""

    what: str
    estimate: float | None  # seconds; None: nothing was promised
    seconds: float

    @property
    def error(self) -> float | None:
        """Share by which the estimate was above (or below) the time."""
        return None if self.estimate is None else self.estimate / self.seconds - 1


def main(
    model: Annotated[str, typer.Argument(help="A model of the page.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "tent",
    sides: Annotated[
        str | None, typer.Option(help="Pixels of the pictures, with commas; default: the model's.")
    ] = None,
    new_sides: Annotated[str | None, typer.Option(help="Of pictures whose size is new; default: between.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each picture.", min=2)] = 20,
    runs: Annotated[int, typer.Option(help="Jobs of each kind.", min=2)] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of all figures.")] = None,
) -> None:
    """Run the jobs, and print the errors of their estimates."""
    worker = Worker(limits=Limits(side=4096, calls=10**9), device=device)
    with cpu_threads(threads):
        worker.warm_up(model)
        own = worker.models.describe(model)
        usual, new = _sides(own.size, own.draws_classes)
        drawn, later = (given if text is None else _numbers(text) for text, given in ((sides, usual), (new_sides, new)))
        found = list(_jobs(worker, (model, prompt), drawn, later, steps, runs))
    rows = [
        (job.what, _or_none(job.estimate, ".1f"), f"{job.seconds:.1f}", _or_none(job.error, "+.0%")) for job in found
    ]
    typer.echo(text_table(("job", "estimate s", "took s", "error"), rows))
    errors = [abs(job.error) for job in found if job.error is not None]
    within = sum(error <= PROMISED for error in errors)
    typer.echo(f"{within} of {len(errors)} estimates within {PROMISED:.0%}; {len(found) - len(errors)} without one")
    if out is not None:
        jobs = [asdict(job) | {"error": job.error} for job in found]
        write_json(out, {"model": model, "machine": describe_machine(worker.device), "jobs": jobs})


def _sides(own: tuple[int, int] | None, only_own: bool) -> tuple[list[int], list[int]]:
    """Half the size that a model was trained at and all of it; and a size in between."""
    if own is None:
        raise typer.BadParameter("this model's size is not known: give --sides")
    side = max(own)
    return ([side], []) if only_own else ([side // 2, side], [side * 3 // 4])


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _jobs(
    worker: Worker, of: tuple[str, str], sides: list[int], new: list[int], steps: int, runs: int
) -> Iterator[Job]:
    """Every job, as it ends.

    Args:
        of: model and prompt.
    """

    def request(side: int, **changes: Any) -> Any:
        given = {"steps": steps, "width": side, "height": side, "acceleration": "automatic"} | changes
        return worker.limits.request(*of, **given)

    for side in sides:
        for way in ("none", "automatic"):
            for _ in range(runs):
                yield _drawn(worker, request(side, acceleration=way), f"{side} {way}")
        yield _drawn(worker, request(side, steps=2 * steps), f"{side} automatic, {2 * steps} steps")
    for side in new:
        for way in ("none", "automatic"):
            yield _drawn(worker, request(side, acceleration=way), f"{side} {way}, first of its size")
    for side in sides:
        asked = request(side, num_images=3)
        estimate, begin = worker.estimates.seconds_to_compare(asked, ["automatic"]), time.perf_counter()
        for _ in worker.compare("", asked, ["automatic"]):
            pass
        yield Job(f"{side} compared", estimate, time.perf_counter() - begin)


def _drawn(worker: Worker, asked: Any, what: str) -> Job:
    estimate, begin = worker.estimates.seconds_for(asked), time.perf_counter()
    for _ in worker.generate("", asked):
        pass
    return Job(what, estimate, time.perf_counter() - begin)


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


if __name__ == "__main__":
    typer.run(main)
