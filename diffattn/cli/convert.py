"""`diffattn convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffattn.cli.common import bad_input, check_outputs, fail, loading, stdout, write_json
from diffattn.cli.options import JsonFile


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Official .pt or .safetensors file, or the folder of a DiT or DiTTransformer2DModel."
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder, or a .safetensors file for --to official.")],
    to: Annotated[
        str, typer.Option(help="Layout: diffattn (folder), official (file) or diffusers (folder).")
    ] = "diffattn",
    key: Annotated[
        str | None,
        typer.Option(
            help="Dotted path of the weights inside the file, e.g. state_dict.model.",
            show_default="detected by name, EMA weights first",
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads.", show_default="from the biases, or from the width of S, B, L, XL"),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            help="velocity (SiT, mediators) or epsilon (DiT).", show_default="velocity; epsilon for a diffusers folder"
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(help="Interpolant of a velocity model: linear or gvp.", show_default="linear"),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes, if the label table has no null row.", show_default="rows - 1")
    ] = None,
    sample_size: Annotated[
        str | None,
        typer.Option(help="Height x width of the latents, if not square: 32x64.", show_default="of the weights"),
    ] = None,
    num_mediators: Annotated[
        int | None,
        typer.Option(
            help="Number of mediators whose biases are written to an official file.", show_default="the model's largest"
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="unchanged")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST if it exists.")] = False,
    json: JsonFile = None,
) -> None:
    """Convert a checkpoint between the official layout, diffattn's and diffusers'.

    Official files are DiT, SiT and published mediator checkpoints. Only tensors and plain values are read from a .pt
    file; code in it is never run. Weights are written as safetensors.
    """
    check_outputs(json, dest, folder=to != "official")
    with loading(str(source)), bad_input():
        import torch

        from diffattn.machine import choose_dtype
        from diffattn.models.convert_files import ReadOptions, check_destination, read_model, write_model

        check_destination(dest, to, force)
        wanted = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
        options = ReadOptions(key, num_heads, prediction, num_classes, _size(sample_size), path)
        model, layout = read_model(source, options)
        try:
            write_model(model, dest, to, num_mediators=num_mediators, dtype=wanted)
        except OSError as error:  # the system's own errors have a reason and do not name the file
            fail(f"cannot write to {str(dest)!r}: {error.strerror}" if error.strerror else str(error))
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    parameters = sum(p.numel() for p in model.parameters())
    write_json(json, {"source": str(source), "from": layout, "dest": str(dest), "to": to,
                      "parameters": parameters, "config": config})  # fmt: skip
    stdout.print(f"{layout} -> {to}: {_summary(model, parameters)}\nwritten to {dest}", markup=False)


def _summary(model: Any, parameters: int) -> str:
    """The size of a model, its layers, and what it predicts."""
    kinds = ", ".join(f"{model.attention.count(kind)} {kind}" for kind in dict.fromkeys(model.attention))
    mediators = f", mediators {', '.join(map(str, model.mediators))}" if model.mediators else ""
    size = f"{parameters / 1e6:.1f}M parameters, width {model.config['hidden_size']}"
    return f"{size}, layers: {kinds}{mediators}; predicts {model.config['prediction']}"


def _size(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--sample-size must be one number, or height x width such as 32x64, got {text!r}")
    numbers = tuple(map(int, parts))
    return numbers[0] if len(numbers) == 1 else numbers
