"""`diffattn app`; the module is named differently because the package itself has an `app`."""

from pathlib import Path
from typing import Annotated

import typer

from diffattn.cli.common import bad_input, fail
from diffattn.cli.options import Device, FastestDtype


def app(
    models_dir: Annotated[
        Path | None, typer.Option(help="Folder of selectable models in diffusers' layout.", metavar="FOLDER")
    ] = None,
    hub: Annotated[bool, typer.Option(help="Allow models from the hub (owner/name).")] = True,
    port: Annotated[
        int | None, typer.Option(help="Port.", show_default="the first free one from 7860 up", min=1, max=65535)
    ] = None,
    listen: Annotated[bool, typer.Option("--listen", help="Listen on all network addresses; needs --auth.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Create a public link through Gradio's servers; needs --auth.")
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            help="Name and password required to open the page.", metavar="NAME:PASSWORD", envvar="DIFFATTN_AUTH"
        ),
    ] = None,
    max_side: Annotated[int, typer.Option(help="Maximum width and height, in pixels.", min=8)] = 1024,
    max_steps: Annotated[int, typer.Option(help="Maximum number of steps.", min=1)] = 100,
    max_images: Annotated[int, typer.Option(help="Maximum number of pictures per job.", min=1)] = 8,
    max_minutes: Annotated[float, typer.Option(help="Maximum duration of a job, in minutes.", min=0.1)] = 60,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="Host name under which others reach the page; repeatable.", metavar="NAME"),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            help="Address of the proxy in front of the page; only its forwarded headers are trusted.", metavar="ADDRESS"
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in a browser.")] = False,
    device: Device = "auto",
    dtype: FastestDtype = "auto",
) -> None:
    """Open the web page: draw, compare with exact attention, measure speed and FID, inspect the time steps.

    Only this computer can reach it, unless --listen or --share is given. Needs the extra "app".
    """
    with bad_input():
        try:
            from diffattn.app.page import Access, launch
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            fail("the web page needs Gradio: pip install 'diffattn[app]'")
        from diffattn.app.jobs import Limits, Models, Worker

        limits = Limits(side=max_side, steps=max_steps, images=max_images, seconds=60 * max_minutes)
        worker = Worker(Models(models_dir, hub), limits, device, dtype)
        try:
            host = "0.0.0.0" if listen else "127.0.0.1"
            launch(worker, Access(host, share, _auth(auth), host_name or (), proxy), port=port, open_browser=browser)
        except OSError as error:
            fail(f"cannot serve the page on port {port or '7860 and up'}: {error}")


def _auth(given: str | None) -> tuple[str, str] | None:
    if given is None:
        return None
    name, _, password = given.partition(":")
    if not (name and password):
        raise ValueError("--auth must be NAME:PASSWORD, with neither empty")
    return name, password
