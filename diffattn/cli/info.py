"""`diffattn info`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from diffattn.cli.common import bad_input, check_writable, fail, loading, progress, stdout, write_json
from diffattn.cli.options import Device, Dtype, JsonFile, Variant


def info(
    model: Annotated[
        str | None,
        typer.Option(
            help="Report whether patching this model pays off here: embedded model, folder, or hub id (owner/name).",
            show_default=False,
        ),
    ] = None,
    variant: Variant = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW|N", help="With --model: height and width in pixels.", show_default="the model's own"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="With --model: attention method.", show_default="the one that suits the model"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="With --model: preset of the method.", show_default="balanced")
    ] = None,
    batch: Annotated[int, typer.Option(help="With --model: batch size of a call; 2 is one picture with guidance.")] = 2,
    rounds: Annotated[int, typer.Option(help="With --model: timings per kind of call; the kinds take turns.")] = 5,
    time_budget: Annotated[
        float, typer.Option(help="With --model: start no further round after this many minutes.")
    ] = 5.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="With --model: one row per layer, not per kind of layer.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Show versions, devices and what is supported; with --model, whether patching pays off on this machine.

    Lists denoisers, methods with their options and presets, embedded models, and the thresholds in use.

    With --model, times one denoiser call layer by layer: the share of self-attention, the most that any method could
    save, and what the preset saves. Patching pays off if the attention of the accelerated layers, without projections,
    takes at least 10 % of a call, and a patched call was faster in at least three quarters of the rounds.
    """
    check_writable(json)
    if model is not None:
        asked: dict[str, Any] = {
            "method": method,
            "preset": preset,
            "batch": batch,
            "rounds": rounds,
            "variant": variant,
        }
        _print_preflight(_preflight(model, size, device, dtype, time_budget, json, **asked), layers)
        return
    given = {"--size": size, "--method": method, "--preset": preset, "--variant": variant}
    for option, value in given.items():
        if value is not None:
            fail(f"{option} {value!r} applies to a model: give --model too")
    _capabilities(json)


def _preflight(
    model: str, size: str | None, device: str, dtype: str, time_budget: float, json: Path | None,
    variant: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Run the preflight of a model at a size; write it as JSON if asked to."""
    height, width = (None, None) if size is None else _size(size)
    if not time_budget > 0:
        fail(f"--time-budget must be above 0 minutes, got {time_budget}")
    with loading(model), bad_input():
        from diffattn.drawing.loading import load_pipeline
        from diffattn.machine import choose_device, choose_dtype
        from diffattn.preflight.run import PreflightRun

        place = choose_device(device)
        pipe: Any = load_pipeline(model, choose_dtype(dtype, place), variant).to(place)
        run = PreflightRun(pipe, height, width, **options)
    with progress("timing", total=run.rounds) as advance:
        found = run(time_budget=60 * time_budget, on_round=advance)
    write_json(json, {"asked_for": model, **found.to_dict()})
    return found


def _print_preflight(found: Any, by_layer: bool) -> None:
    """Print a table of the layers, the figures of the whole call, and the verdict."""
    if by_layer:
        stdout.print(str(found), markup=False)
        return
    table = Table(title="self-attention in one denoiser call (core: without the projections)", title_justify="left")
    head, *rows = found.group_rows()
    for name in head:
        table.add_column(name, justify="left" if name == head[-1] else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)
    _print("the whole call", found.summary())
    stdout.print(found.verdict, markup=False)


def _size(text: str) -> tuple[int, int]:
    """Height and width from "HxW" or "N"."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if found is None:
        fail(f"--size must be pixels as HxW or N, such as 512x768 or 512, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _capabilities(json: Path | None) -> None:
    """Versions, devices and what is supported."""
    with bad_input():
        from diffattn.capabilities import capabilities

        found = capabilities()
    write_json(json, found)
    _print("versions", found["versions"])
    _print("devices", {name: _words(device) for name, device in found["devices"].items()})
    _print("supported denoisers", dict.fromkeys(found["architectures"], ""))
    _print("attention of a DiT to train (diffattn train model.attention=…)", found["backbone_attention"])
    for name, method in found["methods"].items():
        _print_method(name, method)
    models = found["embedded_models"].items()
    _print("embedded models", {n: f"{m['what']}{'' if m['installed'] else ' (not installed)'}" for n, m in models})
    thresholds = found["thresholds"]
    rows = {
        device: ", ".join(f"{agents} agents: {'not known' if x is None else x}" for agents, x in row.items())
        for device, row in thresholds["devices"].items()
    }
    _print(f"tokens from which agents are assumed to pay until timed ({thresholds['file']})", rows)
    decisions = found["decisions"]
    rows = {device: f"{count} kinds of calls" for device, count in decisions["known"].items()}
    _print(f"what is faster here, as timed ({decisions['file'] or 'switched off'})", rows)


def _print(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for _ in range(2 if any(rows.values()) else 1):
        table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(*filter(None, (name, text)))
    stdout.print(table)


def _print_method(name: str, method: Mapping[str, Any]) -> None:
    """One row per option and one column per preset; below, what changes with the noise level."""
    table = Table(title=f"method {name}: options and presets", title_justify="left")
    presets = method["presets"]
    for head in ("option", "default", *presets):
        table.add_column(head, overflow="fold")
    for option, default in method["options"].items():
        values = (str(x["options"][option]) if option in x["options"] else "" for x in presets.values())
        table.add_row(option, str(default), *values)
    stdout.print(table)
    by_level = {preset: _schedule(x["schedule"]) for preset, x in presets.items() if x["schedule"] is not None}
    if by_level:
        _print(f"method {name}: by noise level (1 noise, 0 data)", by_level)


def _schedule(schedule: Mapping[str, Any]) -> str:
    lines = (f"from {u}: {x if isinstance(x, str) else _words(x) or 'as above'}" for u, x in schedule.items())
    return "\n".join(lines)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
