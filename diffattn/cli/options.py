"""Options that several commands share, in groups: the model, its acceleration, sampling, scoring, output."""

from pathlib import Path
from typing import Annotated

import typer

# Where and how the command runs.

Seed = Annotated[int, typer.Option(help="Random seed, 0 to 2^63.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps; auto: the first available of cuda, mps, cpu.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: float16 on cuda, float32 elsewhere.")]
FastestDtype = Annotated[
    str, typer.Option(help="float32, float16 or bfloat16; auto: bfloat16 where the hardware has it, otherwise float32.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]

# The model.

WHERE = "an embedded model, a folder in diffusers' layout, or a hub id (owner/name)"
Model = Annotated[str, typer.Option(help=f"The model: {WHERE}.")]
MaybeModel = Annotated[str | None, typer.Option(help=f"Draw with this model: {WHERE}.", show_default=False)]

Variant = Annotated[
    str | None,
    typer.Option(help="Variant of the weights, e.g. fp16.", show_default="plain weights, or the only variant"),
]

# Its acceleration.

METHOD = "Attention method, see `diffattn info`; none leaves the model unpatched."
Method = Annotated[str | None, typer.Option(help=METHOD, show_default="the one that suits the model")]
EvaluatedMethod = Annotated[
    str | None, typer.Option(help=METHOD, show_default="none; with --paired the one that suits the model")
]
Preset = Annotated[
    str | None, typer.Option(help="Preset of the method, see `diffattn info`.", show_default="the method's own")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the method; repeatable.", show_default=False),
]
Recipe = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Recipe written by `diffattn tune`; it names the method.", show_default=False),
]

# Sampling.

PROMPTS = "Text file with one prompt (or class) per line, .csv or .tsv with a column of prompts, or: drawbench."
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help=PROMPTS, show_default=False)]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance scale; 1 or less turns guidance off.", show_default="the model's own"),
]
Width = Annotated[int | None, typer.Option(help="Width in pixels.", show_default="the model's own")]
Height = Annotated[int | None, typer.Option(help="Height in pixels.", show_default="the model's own")]

# Scoring.

EXTRACTORS = "inception, dinov2, clip, emoji-classifier or cifar-classifier"
ExtractorWeights = Annotated[
    str | None,
    typer.Option(
        help="Weights file of inception, or a folder or hub id for the others.",
        show_default="the library's own location",
    ),
]
Clip = Annotated[str | None, typer.Option(metavar="PATH", help="CLIP model (folder or hub id) for the CLIP score.")]
PickScore = Annotated[
    str | None,
    typer.Option("--pickscore", metavar="PATH", help="PickScore's CLIP model, e.g. yuvalkirstain/PickScore_v1."),
]
ClipI = Annotated[
    str | None, typer.Option("--clip-i", metavar="PATH", help="CLIP model for CLIP-I, the similarity of pairs.")
]
DinoI = Annotated[
    str | None,
    typer.Option(
        "--dino-i", metavar="PATH", help="DINO or DINOv2 (folder or hub id) for DINO-I, the similarity of pairs."
    ),
]
LpipsWeights = Annotated[Path | None, typer.Option(metavar="FILE", help="torchvision's AlexNet: LPIPS.")]
Side = Annotated[
    int | None, typer.Option(help="Crop every picture to a square and resize it to SIZE pixels.", show_default="as is")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip pictures that cannot be read.")]

# Output.

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep the results in the folder and measure only what is missing.")
]
