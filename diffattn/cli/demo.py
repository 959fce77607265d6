"""`diffattn demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from diffattn.cli.common import bad_input, check_outputs, loading, progress, stdout, write_json
from diffattn.cli.options import Device, FastestDtype, JsonFile, Seed

if TYPE_CHECKING:
    from diffattn.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option(help="Folder for comparison.png and result.json.")] = Path("outputs/demo"),
    model: Annotated[str, typer.Option(help="Embedded model.")] = "emoji-sd",
    method: Annotated[
        str | None,
        typer.Option(help="Attention method, see `diffattn info`.", show_default="the one that suits the model"),
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset of the method, see `diffattn info`.")] = "balanced",
    steps: Annotated[int, typer.Option(help="Sampling steps per picture.")] = 16,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance scale; 1 or less turns guidance off.", show_default="the model's own"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each prompt is drawn and timed, unpatched and patched.")] = 1,
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels, width and height. Other sizes than the model's own are only timed.",
            show_default="the model's own",
        ),
    ] = None,
    mediators: Annotated[
        bool, typer.Option(help="Also draw with the embedded SiT, with all, a dynamic number and few of its mediators.")
    ] = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: FastestDtype = "auto",
    json: JsonFile = None,
) -> None:
    """Draw the same pictures unpatched and patched, and compare appearance and speed.

    The embedded model draws every prompt both ways, alternating. The sheet shows the pictures and their difference;
    the figures give times and similarity. A second model, a SiT with mediators, then draws the same names with all of
    its mediators, with as many as the time step needs, and with the fewest.
    """
    check_outputs(json, out, folder=True)
    with loading(model), bad_input():
        from diffattn.demo import Demo, DemoSettings
        from diffattn.drawing.batch import NotFinite

        settings = DemoSettings(
            model=model, method=method, preset=preset, steps=steps, guidance=guidance, rounds=rounds, seed=seed,
            size=size, device=device, dtype=dtype, mediators=mediators,
        )  # fmt: skip
        ready = Demo(settings)
    with progress("drawing pictures", total=ready.num_pictures) as advance, bad_input(NotFinite):
        result = ready.run(advance)
    sheet, figures = result.save(out)
    write_json(json, result.to_dict())
    stdout.print(_table(result))
    stdout.print(str(result.report), markup=False)
    verdicts = "\n".join(filter(None, (result.verdict, result.mediators_verdict)))
    stdout.print(f"\n{verdicts}\nPictures: {sheet}\nFigures:  {figures}", markup=False)


def _table(result: "DemoResult") -> Table:
    settings = result.settings
    table = Table(
        title=f"{settings.model} at {result.size}x{result.size}, {settings.steps} steps, {result.device}, "
        f"{str(result.dtype).removeprefix('torch.')}: unpatched against {settings.method}, {settings.preset}",
        title_justify="left",
    )
    table.add_column("prompt")
    for head in ("unpatched s", "patched s", "speed-up", "foreground PSNR dB", "SSIM"):
        table.add_column(head, justify="right")
    for row in (*result.pairs, result):
        name = getattr(row, "prompt", "all (medians; mean SSIM)")
        inside = row.foreground_psnr
        figures = (row.baseline_s, row.accelerated_s, row.speedup, inside[0] if isinstance(inside, tuple) else inside,
                   row.ssim)  # fmt: skip
        formats = (".2f", ".2f", ".2f", ".1f", ".3f")
        table.add_row(name, *("-" if x is None else format(x, f) for x, f in zip(figures, formats, strict=True)))
    return table
