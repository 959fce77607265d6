"""`diffattn train`: a DiT/SiT with the attention of your choice from a folder of images."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from diffattn.cli.common import BAD_INPUT, bad_input, check_apart, check_writable, fail, stdout, write_json
from diffattn.cli.options import JsonFile


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, e.g. optim.lr=1e-3 model.attention=softmax; they override preset and file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Pictures: class folders, a zip, or a Hugging Face data set. Same as data.source=…"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Same as run.out=…")] = None,
    preset: Annotated[
        str | None, typer.Option(help="cifar-sit, cifar-sit-cpu, cifar-linear-cpu, emoji-sit-cpu or sit-256.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or YAML file of settings.", metavar="FILE")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as run.seed=…  [default: 0]")] = None,
    device: Annotated[str, typer.Option(help="cpu, or auto: accelerate's choice.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or auto. Same as run.precision=…")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameters, GFLOPs, memory, processes, precision and steps, then stop."),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Train a class-conditional SiT; repeat the command to resume a run that was killed.

    model.attention is softmax, agent, mediator, inline, focused_linear, mlla or circulant, or a list with one per
    layer; model.steps=[[64,2],[128,4]] widens the tokens from block to block. diffattn info describes each.

    SIGTERM, SIGUSR1 and Ctrl+C save a checkpoint first. Several processes or GPUs: accelerate launch
    pipelines/train.py with the same arguments; all machines need the same pictures and one shared run.out.
    """
    check_writable(json)
    options = {
        "data.source": data,
        "run.out": None if out is None else str(out),
        "run.seed": seed,
        "run.precision": dtype,
    }
    with bad_input():
        from diffattn.training.config import TrainConfig
        from diffattn.training.processes import is_shared
        from diffattn.training.run import finish
        from diffattn.training.run import train as run_training
        from diffattn.training.setup import set_up
        from diffattn.training.signals import Stopped

        read = TrainConfig.read(preset, config, settings or (), options)
        check_writable(Path(read.run.out), folder=True)
        check_apart(json, Path(read.run.out))
        setup = set_up(read, device, _say)
    for line in setup.plan.lines():
        setup.say(line)
    if dry_run:
        write_json(json, {"config": read.to_dict(), "plan": setup.plan.to_dict()})
        return
    try:
        folder = run_training(setup)
    except Stopped as error:
        setup.say(str(error))
        finish()
        raise typer.Exit(error.exit_code) from None
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is RuntimeError:
            raise  # raised by torch: a bug, so keep its traceback
        if is_shared(error) and not setup.accelerator.is_main_process:
            raise typer.Exit(BAD_INPUT) from None  # the main process reports it
        fail(str(error))
    finish()
    write_json(json, {"config": read.to_dict(), "plan": setup.plan.to_dict(), "pipeline": str(folder)})


def _say(line: str) -> None:
    with suppress(OSError):  # standard output may be a file on a full disk, or a pipe that was closed
        stdout.print(line, markup=False)
