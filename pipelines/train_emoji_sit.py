"""Train, judge and export `emoji-sit`: a class-conditional SiT with elastic mediators on latents of 512×512 pictures.

    python pipelines/train_emoji_sit.py train --data noto-emoji-512.zip --work outputs/emoji-sit
    python pipelines/train_emoji_sit.py train --data noto-emoji-512.zip --work outputs/emoji-sit/softmax \\
        model.attention=softmax
    python pipelines/train_emoji_sit.py judge outputs/emoji-sit/512/pipeline --data noto-emoji-512.zip
    python pipelines/train_emoji_sit.py export --work outputs/emoji-sit --figures outputs/judged/figures.json

The classes are the names of every 8th picture, those of `emoji-sd`, whose autoencoder is used. Training begins at
128×128 pixels and continues at 256 and 512, each time from the weights before it (`diffattn train` with preset
`emoji-sit-cpu` and `model.start`). Repeat a command to resume a run that was killed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from emoji_sd.data import load_pictures, split_names
from emoji_sd.evaluate import Figures, grid, name_figures
from emoji_sit.card import export_model
from emoji_sit.stages import EVERY, STAGES, configs, make_data, train_all
from torch import Tensor

from diffattn.drawing.batch import draw_batch
from diffattn.files import read_json, write_json
from diffattn.machine import choose_dtype, describe_machine
from diffattn.sampling import SiTPipeline
from diffattn.training.signals import Stopped

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Data = Annotated[Path, typer.Option(help="The zip of captioned pictures.")]
Work = Annotated[Path, typer.Option(help="Folder of the runs, one per size.")]
Device = Annotated[str, typer.Option(help="cpu, or auto: accelerate's choice.")]


@app.command("train")
def train_command(
    data: Data,
    work: Work,
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of every run: section.field=value.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every run, to try it out.")] = None,
    stages: Annotated[int, typer.Option(help="How many runs: 1 for 128 pixels only.", min=1)] = len(STAGES),
    every: Annotated[int, typer.Option(help="Every n-th picture is a class.", min=1)] = EVERY,
    device: Device = "cpu",
) -> None:
    """Train at 128, 256 and 512 pixels."""
    chosen = STAGES[:stages]
    if steps is not None:
        chosen = tuple(replace(stage, steps=steps) for stage in chosen)
    folder = make_data(data, work / "data", every)
    try:
        done = train_all(configs(folder, work, chosen, settings or []), device, typer.echo)
    except Stopped as error:
        typer.echo(str(error))
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"the last pipeline: {done}")


@app.command("judge")
def judge_command(
    pipeline: Annotated[Path, typer.Argument(help="Folder of a trained pipeline.")],
    data: Data,
    numbers: Annotated[str, typer.Option(help="Numbers of mediators; nothing for a softmax model.")] = "64",
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 20,
    guidance: Annotated[str, typer.Option(help="Guidance scale, or several to sweep: 1,1.5,2.")] = "1.5",
    limit: Annotated[int | None, typer.Option(help="Only this many classes, evenly spread.")] = None,
    every: Annotated[int, typer.Option(help="As in training.", min=1)] = EVERY,
    seed: Annotated[int, typer.Option(help="Of every picture.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Folder of figures.json and the grids.")] = Path("outputs/judged"),
) -> None:
    """Draw every class, and see how often the picture is nearest to the true one."""
    pipe = SiTPipeline.from_pretrained(pipeline, dtype=choose_dtype(dtype, torch.device("cpu")))
    pipe.set_progress_bar_config(disable=True)
    pictures = load_pictures(data, 8 * pipe.transformer.config["sample_size"])
    trained, _ = split_names(len(pictures), every, keep=True)
    asked = trained if limit is None else trained[:: max(len(trained) // limit, 1)][:limit]
    rows: list[Figures] = []
    for n in [int(n) for n in numbers.split(",") if n] or [None]:
        if n is not None:
            pipe.transformer.set_num_mediators(n)
        for scale in map(float, guidance.split(",")):
            drawn = draw(pipe, [pictures.names[i] for i in asked], steps, scale, seed)
            settings = {"num_mediators": n, "guidance": scale, "steps": steps, "seed": seed, "dtype": dtype}
            rows.append(settings | name_figures(drawn, pictures, asked))
            typer.echo(json.dumps(rows[-1]))
            shown = asked[:: max(len(asked) // 32, 1)][:32]
            at = [asked.index(i) for i in shown]
            file = out / f"grid-{'softmax' if n is None else n}-{scale:g}.png"
            grid(pictures.images[shown], drawn[at], [pictures.names[i] for i in shown], file)
    write_json(out / "figures.json", {"machine": describe_machine(torch.device("cpu")), "judged": rows})


def draw(pipe: SiTPipeline, names: list[str], steps: int, guidance: float, seed: int, batch: int = 8) -> Tensor:
    """One picture per class, each from its own generator with the same seed. → uint8 [N, 3, S, S]"""
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    parts = [names[i : i + batch] for i in range(0, len(names), batch)]
    drawn = [draw_batch(pipe, part, [seed] * len(part), settings).images for part in parts]
    return (torch.cat(drawn) * 255).round().to(torch.uint8)


@app.command("export")
def export_command(
    work: Work,
    figures: Annotated[Path, typer.Option(help="figures.json of `judge`.")],
    guidance: Annotated[float | None, typer.Option(help="The model's own; default as trained.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("diffattn/assets/emoji-sit"),
) -> None:
    """Write the model of 512 pixels with its autoencoder in fp16, and its card."""
    size = export_model(work, STAGES, read_json(figures), guidance, out)
    typer.echo(f"{size / 1e6:.1f} MB written to {out}")


if __name__ == "__main__":
    app()
