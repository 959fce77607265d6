"""Restoring settings: after a reload, from the browser; from a picture's file, by its record."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, Worker
from diffattn.app.jobs.restore import SETTINGS, checked_settings, record_of_file, settings_of_record
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
    chosen = settings["acceleration"] if settings["acceleration"] in names else names[0]
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


def kept_in_browser(name: str) -> gr.BrowserState:
    """The settings of a tab. Create this outside the tab: Gradio reads nothing in a tab that has not been shown. The
    encryption key need not be secret, since the settings are the visitor's own."""
    return gr.BrowserState(None, storage_key=KEY + name, secret=KEY)


def wire_reload(
    page: gr.Blocks, worker: Worker, found: Inputs, files: Files, stored: gr.BrowserState, several: bool
) -> None:
    """Keep the settings of Generate or Compare across reloads, see `keep_over_reload`.

    Args:
        page, worker, found, files: of the page; the recipe, which is a file, is not kept.
        stored: of the tab.
        several: the tab has a list of accelerations.
    """
    names: list[Any] = [setting for setting in SETTINGS if setting != "recipe"]

    def shown(values: list[Any]) -> list[Any]:
        given = dict(zip(names, values, strict=True))
        given |= {number: given_or_own(given[number]) for number in NUMBERS}
        chosen = worker.limits.variants_of(given["acceleration"]) if several else given["acceleration"]
        one = given | ({"acceleration": AUTOMATIC} if several else {})
        usable = checked_settings(one, worker.models, worker.limits)
        every: dict[str, Any] = dict(zip(SETTINGS, updates(worker, usable, files), strict=True))
        every |= {"acceleration": chosen} if several else {}
        return [every[setting] for setting in names]

    kept = [getattr(found, setting) for setting in names]
    found.filled.append(keep_over_reload(page, stored, kept, shown))


def keep_over_reload(
    page: gr.Blocks, stored: gr.BrowserState, kept: Sequence[Any], shown: Callable[[list[Any]], Sequence[Any]]
) -> Any:
    """Keep the values of components in the browser while they change, and restore them when the page is opened again.

    Args:
        stored: where they are kept, see `kept_in_browser`.
        kept: the components.
        shown: checks values, which are untrusted, and gives the updates that show them; raises for bad ones, which are
            then forgotten.

    Returns:
        The event after which they are shown.
    """
    components: list[Any] = list(kept)

    def restore(values: Any) -> Any:
        try:
            found = list(shown(values)) if isinstance(values, list) and len(values) == len(components) else []
        except (ValueError, TypeError, IndexError):
            found = []
        found = found or [gr.skip()] * len(components)
        return found if len(found) > 1 else found[0]

    gr.on(
        [component.change for component in components], None, components, stored, js="(...values) => [values]",
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    return page.load(restore, stored, components, api_visibility="private", **QUICK)


def wire_drop(
    worker: Worker, found: Inputs, files: Files, dropped: gr.File, stage: gr.HTML, restored: gr.State
) -> None:
    """Restore the settings of a picture that is dropped, and note its record, or say why its file has none."""

    def restore(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return (gr.skip(),) * (3 + len(found.all()))
        try:
            record = record_of_file(Path(path))
            settings = settings_of_record(record, worker.models, worker.limits)
        except (ValueError, TypeError) as error:
            raise toast(error) from None
        said = note(f"Settings of {Path(path).name} restored: press Generate to draw it again.")
        return None, said, record, *updates(worker, settings, files)

    outputs = [dropped, stage, restored, *found.all()]
    found.filled.append(dropped.upload(restore, dropped, outputs, api_visibility="private", **TOLD))
