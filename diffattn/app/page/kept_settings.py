"""Settings that come back: after a reload from the browser, and from the record in a picture's file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, Worker
from diffattn.app.jobs.restore import SETTINGS, checked_settings, settings_of_file
from diffattn.app.jobs.suited import own_method, plain_name, suited_accelerations
from diffattn.app.page.files import Files
from diffattn.app.page.inputs import Inputs
from diffattn.app.page.shared import QUICK, TOLD, given_or_own, note, toast

KEY = "diffattn-settings-"
NUMBERS = ("guidance", "width", "height")


def updates(worker: Worker, settings: Mapping[str, Any], files: Files) -> list[Any]:
    """Updates of `Inputs.all()` of Generate that show these settings."""
    place = worker.models.place(settings["model"])
    names, own = suited_accelerations(place), own_method(place)
    chosen = settings["acceleration"] if settings["acceleration"] in names else AUTOMATIC
    shown = dict(settings) | {
        "acceleration": gr.Dropdown([(plain_name(name, own), name) for name in names], value=chosen),
        "recipe": _as_file(settings["recipe"], files),
    }
    return [shown[name] for name in SETTINGS]


def _as_file(recipe: Mapping[str, Any] | None, files: Files) -> str | None:
    """A recipe as the file that the page's recipe box holds."""
    if recipe is None:
        return None
    path = files.subfolder() / "recipe.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def wire_reload(page: gr.Blocks, worker: Worker, found: Inputs, files: Files, name: str) -> None:
    """Keep a tab's settings in the browser while they change, and restore them when the page is opened again.

    The key to their encryption need not be secret: they are the visitor's own. They are checked like any input.
    """
    stored = gr.BrowserState(None, storage_key=KEY + name, secret=KEY)
    kept = [component for component in found.all() if component is not found.recipe]
    names = [setting for setting in SETTINGS if setting != "recipe"]

    def restore(values: Any) -> list[Any]:
        blank = [gr.skip()] * len(kept)
        if not isinstance(values, list) or len(values) != len(names):
            return blank
        given = dict(zip(names, values, strict=True))
        given |= {number: given_or_own(given[number]) for number in NUMBERS}
        try:
            shown = updates(worker, checked_settings(given, worker.models, worker.limits), files)
        except (ValueError, TypeError):
            return blank
        return [value for setting, value in zip(SETTINGS, shown, strict=True) if setting != "recipe"]

    found.filled.append(page.load(restore, stored, kept, api_visibility="private", **QUICK))
    gr.on(
        [component.change for component in kept], None, kept, stored, js="(...values) => [values]",
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip


def wire_drop(worker: Worker, found: Inputs, files: Files, dropped: gr.File, stage: gr.HTML) -> None:
    """Restore the settings of a picture that is dropped, or say why its file has none."""

    def restore(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return (gr.skip(),) * (2 + len(found.all()))
        try:
            settings = settings_of_file(Path(path), worker.models, worker.limits)
        except (ValueError, TypeError) as error:
            raise toast(error) from None
        said = note(f"Settings of {Path(path).name} restored: press Generate to draw it again.")
        return None, said, *updates(worker, settings, files)

    outputs = [dropped, stage, *found.all()]
    found.filled.append(dropped.upload(restore, dropped, outputs, api_visibility="private", **TOLD))
