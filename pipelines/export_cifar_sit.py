"""Turn a finished run of `diffattn train` on CIFAR-10 into the embedded model: fp16 weights, figures, a model card.

python pipelines/export_cifar_sit.py --run outputs/cifar-sit --comparison outputs/comparison/comparison.json
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from saved_pipeline import drop_origin

from diffattn.sampling import SiTPipeline
from diffattn.training import checkpoints

CARD = """---
license: other
license_name: cifar-10-research-use
license_link: https://www.cs.toronto.edu/~kriz/cifar.html
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# cifar-sit: a SiT with elastic mediators, small enough to ship

A class-conditional `SiTPipeline` that draws the ten classes of CIFAR-10 at 32×32, in pixel space. Every attention layer
has {mediators} mediators to choose from: `set_num_mediators`, or a schedule that follows the time step.

```python
import diffattn

pipe = diffattn.load_demo("cifar-sit")
pipe.transformer.set_num_mediators({smallest})
pipe(["cat", "ship"], num_inference_steps=50, guidance_scale=1.5).images[0].save("cat.png")
```

{note}

## Figures

{table}
`samples/cifar-sit/comparison.json` holds the same numbers with their protocol; `grid.png` beside it shows a line of
pictures per variant. FID and KID are on features of the project's own `cifar-classifier` against the 10,000 test
pictures: they compare with each other and with nothing else. GFLOPs are counted (a multiply-add is two). {times}

```
{commands}
```

## Data and licence

CIFAR-10 (Krizhevsky 2009), the 50,000 training pictures as their publisher re-encoded them to JPEG, mirrored at random.
CIFAR-10 is offered for research; its pictures are not part of this project. Use the weights accordingly.

## Recipe

{parameters:,} parameters: hidden size {model[hidden_size]}, {model[num_layers]} layers, {model[num_heads]} heads,
patch size {model[patch_size]}. Velocity on the linear path, times {objective[time]}, label dropout
{objective[label_dropout]}. {steps:,} steps of {optim[batch]} pictures ({epochs:.1f} epochs), each with one of the
numbers of mediators. AdamW {optim[betas]}, learning rate {optim[lr]:g} ({optim[schedule]}, warm-up
{optim[warmup]} steps), weight decay {optim[weight_decay]}, averaged weights ({optim[ema]}), seed {run[seed]}.
The weights are stored in fp16 and load as fp32.

Hardware: {hardware}. Training took {minutes:.0f} minutes.
"""


def card(config: dict[str, Any], state: dict[str, Any], table: str, **more: Any) -> str:
    """The model card, from the records of the run and the comparison."""
    progress, steps = state["progress"], state["progress"]["step"]
    mediators = [str(n) for n in config["model"]["mediators"]]
    return CARD.format(
        mediators=", ".join(mediators[:-1]) + " or " + mediators[-1], smallest=mediators[0], table=table, steps=steps,
        epochs=steps * config["optim"]["batch"] / 50_000, minutes=progress["seconds"] / 60, **more,
        **{key: config[key] for key in ("model", "objective", "optim", "run")},
    )  # fmt: skip


def wrapped(text: str) -> str:
    """The card with its prose refilled to 120 columns; tables, code and front matter as they are."""
    parts = re.split(r"(^---\n.*?^---\n|```.*?```|^\|.*?$)", text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        paragraphs = parts[i].split("\n\n")
        parts[i] = "\n\n".join(p if p.strip().startswith("#") else refilled(p) for p in paragraphs)
    return "".join(parts)


def refilled(paragraph: str) -> str:
    """One paragraph, its line breaks at both ends kept."""
    body = paragraph.strip("\n")
    filled = textwrap.fill(" ".join(body.split()), 120, break_on_hyphens=False, break_long_words=False)
    return paragraph.replace(body, filled) if body else paragraph


def main(
    run: Annotated[Path, typer.Option(help="Folder of the run of the model with mediators.")],
    comparison: Annotated[Path, typer.Option(help="comparison.json of `compare_mediators.py`.")],
    note: Annotated[str, typer.Option(help="A note before the figures.")] = "",
    times: Annotated[str, typer.Option(help="A note on the time ratios.")] = "",
    command: Annotated[list[str] | None, typer.Option(help="The commands that made it.")] = None,
    hardware: Annotated[str, typer.Option(help="Where it was trained.")] = "2 CPU cores",
    out: Annotated[Path, typer.Option(help="Folder of the exported model.")] = Path("diffattn/assets/cifar-sit"),
) -> None:
    """Export; see above."""
    pipe = SiTPipeline.from_pretrained(run / "pipeline")
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    pipe.to(dtype=torch.float16).save_pretrained(out)
    for path in out.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    folder = checkpoints.latest(run / "checkpoints")
    if folder is None:
        raise typer.BadParameter(f"{run} has no complete checkpoint")
    text = card(
        json.loads((run / "config.json").read_text()), json.loads((folder / checkpoints.STATE).read_text()),
        comparison.with_suffix(".md").read_text(), note=note, times=times,
        commands="\n".join(command or ()), hardware=hardware, parameters=parameters,
    )  # fmt: skip
    (out / "README.md").write_text(wrapped(text))
    drop_origin(out)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    typer.echo(f"{parameters:,} parameters, {size / 1e6:.1f} MB written to {out}")


if __name__ == "__main__":
    typer.run(main)
