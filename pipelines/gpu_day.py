"""A day with a GPU in one command: everything that has only been measured on CPUs so far.

    python pipelines/gpu_day.py --out outputs/gpu-day

Prints its plan with the estimated share of every item, then measures for at most `--minutes`, and stops between items.
Repeat the command to resume; `--plan` only prints. An item that failed or ran out of memory is recorded with its error,
and tried again with `--retry`.

1. Attention alone: exact with each dense backend of torch, landmarks that calibrate or coast, pooled agents, keys.
2. Whole steps of models of real sizes with random weights, eager and compiled.
3. The thresholds of the card, as `diffattn bench thresholds` measures them.
4. Launches and time of the middle step of landmarks, profiled.

Times are medians of CUDA events, variants in turns. Results: items/*.json, and README.md with all tables. `--tiny`
rehearses everything with tiny sizes, also on a CPU. The parts are in `pipelines/day/`.
"""

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from day import alone, middle, steps, thresholds
from day.item import Setting
from day.run import TABLE, Day

from diffattn.cli.common import bad_input, check_writable
from diffattn.machine import resolve

NOT_FINISHED = 1


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/gpu-day"),
    minutes: Annotated[float, typer.Option(help="Begin no item that would not end within this time.")] = 9.0,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan and measure nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed items again.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse with tiny models and sizes.")] = False,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the hardware has it.")] = "auto",
) -> None:
    """Measure everything that needs a GPU, in calls that resume."""
    check_writable(out, folder=True)
    with bad_input():
        if not minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {minutes}")
        setting = Setting(*resolve(device, dtype), out, tiny)
        rooms = (alone, steps, thresholds, middle)
        day = Day(setting, list(chain.from_iterable(room.items(setting) for room in rooms)))
    typer.echo(day.plan())
    if plan:
        return
    finished = day.run(minutes, retry=retry, say=typer.echo)
    typer.echo(f"written to {out / TABLE}")
    if not finished:
        raise typer.Exit(NOT_FINISHED)


if __name__ == "__main__":
    typer.run(main)
