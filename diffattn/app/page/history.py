"""The pictures that a visitor drew in this session, as a strip; a click shows one again and restores its settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import Drawn, Worker
from diffattn.app.jobs.choices import UNPATCHED
from diffattn.app.jobs.restore import settings_of_record
from diffattn.app.jobs.suited import plain_name
from diffattn.app.page.files import Files
from diffattn.app.page.inputs import Inputs
from diffattn.app.page.kept_settings import updates
from diffattn.app.page.shared import QUICK, TOLD, note, toast

MOST = 48  # pictures in the strip; the oldest leave it first

Entry = Mapping[str, Any]  # path, record, code, caption


def entries(drawn: Drawn, paths: Sequence[Path]) -> list[Entry]:
    """The history entries of a job's pictures, in the order in which they were drawn."""
    return [
        {"path": str(path), "record": dict(picture.record), "code": drawn.code, "caption": caption(picture.record)}
        for path, picture in zip(paths, drawn.pictures, strict=True)
    ]


def caption(record: Mapping[str, Any]) -> str:
    """The caption of a picture, which screen readers read out too."""
    name = "/".join(str(part) for part in (record["method"], record["preset"]) if part)
    return f"{record['prompt']}, seed {record['seed']}, {'exact' if name in ('', UNPATCHED) else plain_name(name)}"


def remembered(history: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """The history with a job's pictures so far, which replace those of the same files; the newest `MOST`."""
    paths = {entry["path"] for entry in new}
    return [*(entry for entry in history if entry["path"] not in paths), *new][-MOST:]


def strip() -> gr.Gallery:
    """The strip itself, hidden until there is something earlier to show."""
    return gr.Gallery(
        label="Earlier pictures of this session: click one to see it again, with its settings", format="png",
        type="filepath", interactive=False, columns=8, rows=1, height=120, object_fit="contain", allow_preview=False,
        visible=False, buttons=[], elem_id="history", elem_classes="diffattn-history",
    )  # fmt: skip


def wire_history(
    worker: Worker, found: Inputs, files: Files, history: gr.State, shown: gr.Gallery, run: Any, outputs: Sequence[Any],
    restored: gr.State,
) -> None:  # fmt: skip
    """Keep the strip up to date after the event `run`, and show again what is clicked.

    Args:
        worker, found, files: of the page.
        history: the visitor's entries.
        shown: the strip.
        run: the event that draws.
        outputs: stage, pictures, files, code and records of the tab.
        restored: the record whose settings were restored.
    """

    def refresh(history: Sequence[Entry]) -> Any:
        there = [entry for entry in reversed(history) if Path(entry["path"]).is_file()]
        items = [(entry["path"], entry["caption"]) for entry in there]
        return gr.Gallery(items, visible=len(items) > 1, selected_index=None)

    def show_again(history: Sequence[Entry], event: gr.SelectData) -> tuple[Any, ...]:
        there = [entry for entry in reversed(history) if Path(entry["path"]).is_file()]
        if not isinstance(event.index, int) or not 0 <= event.index < len(there):
            raise gr.Error("This picture is no longer on the server: draw it again.", print_exception=False)
        entry = there[event.index]
        try:
            settings = settings_of_record(entry["record"], worker.models, worker.limits)
        except ValueError as error:
            raise toast(error) from None
        said = note(f"Shown again, with its settings: {entry['caption']}.")
        pictures, paths, record = [(entry["path"], entry["caption"])], [entry["path"]], entry["record"]
        return said, pictures, paths, entry["code"], [record], record, *updates(worker, settings, files)

    run.then(refresh, history, shown, api_visibility="private", **QUICK)
    outputs = [*outputs, restored, *found.all()]
    found.filled.append(shown.select(show_again, history, outputs, api_visibility="private", **TOLD))
