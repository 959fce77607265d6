"""What the page shows before anybody has clicked: written beside the model.

    python pipelines/precompute_first_view.py emoji-sd --prompt "man vampire" --acceleration agent/balanced \\
        --pictures 6 --steps 16
    python pipelines/precompute_first_view.py emoji-sit --prompt unicorn --acceleration mediator/balanced --only-steps

Draws the same pictures exact and accelerated, in turns, at the size that the model was trained at, and stores the first
pair with the speed-up over all of them, its interval and the PSNR (first_view.json and two pictures); and the steps of
the accelerated one (first_steps.json), for the tab that shows steps. `--only-steps` leaves the pair out: small pictures
convince nobody.
"""

from pathlib import Path
from typing import Annotated

import typer

from diffattn.app.jobs import Comparison, Limits, Worker
from diffattn.app.jobs.first_view import write_first_view
from diffattn.app.jobs.stored_steps import write_steps
from diffattn.drawing.loading import embedded_folder, embedded_models
from diffattn.machine import cpu_threads


def main(
    model: Annotated[str, typer.Argument(help="An embedded model.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "tent",
    acceleration: Annotated[str, typer.Option(help="METHOD/PRESET.")] = "agent/fast",
    pictures: Annotated[int, typer.Option(help="Number of pictures of each.", min=3)] = 16,
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the page draws.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    only_steps: Annotated[bool, typer.Option("--only-steps", help="Write no pictures.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the files; default the model's own.")] = None,
) -> None:
    """Measure, and write the files."""
    if model not in embedded_models():
        raise typer.BadParameter(f"{model!r} is no embedded model here; choose from {', '.join(embedded_models())}")
    worker = Worker(limits=Limits(images=1000, calls=10**9), device=device, dtype=dtype)
    asked = worker.limits.request(model, prompt, steps=steps, seed=seed, num_images=pictures)
    with cpu_threads(threads):
        *_, found = worker.compare("", asked, [acceleration])
    assert isinstance(found, Comparison)
    variant, place = found.variants[1], out or embedded_folder(model)
    write_steps(variant.trace, f"{model}, {prompt}, {acceleration}, {steps} steps", place)
    if only_steps:
        typer.echo(f"{acceleration}: n changes before steps {[call + 1 for call in variant.trace.switches]}")
        return
    view = write_first_view(found, variant, worker.device, place)
    typer.echo(f"{view.acceleration}: {view.speedup}, PSNR {view.psnr:.1f} dB; {view.machine}")


if __name__ == "__main__":
    typer.run(main)
