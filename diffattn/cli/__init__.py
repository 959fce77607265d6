"""The command line: parses, calls the library, prints. No logic.

Only light modules are imported here; each command imports torch and diffusers when it runs.
"""

import warnings

import typer

from diffattn.cli import bench, convert, demo, evaluate, generate, info, train, tune, web
from diffattn.cli.common import OneLineErrors, show_warning

app = typer.Typer(
    name="diffattn",
    cls=OneLineErrors,
    help="Linear-cost attention for diffusion models: one line makes a diffusers pipeline faster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("convert")(convert.convert)
app.command("app")(web.app)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="evaluate")


def main() -> None:
    """Entry point of `diffattn` and `python -m diffattn`."""
    warnings.showwarning = show_warning
    app(prog_name="diffattn")
