""" "Compare this picture": from a picture under Generate to its comparison with exact attention."""

from typing import Any

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.jobs.restore import SETTINGS, settings_of_record
from diffattn.app.jobs.speed_up import LEAST
from diffattn.app.page.compare import Compared
from diffattn.app.page.files import Files
from diffattn.app.page.generate import Generated
from diffattn.app.page.kept_settings import updates
from diffattn.app.page.shared import QUICK, TOLD, toast

PRESS = "() => { document.querySelector('#compare').click(); }"


def compare_this(worker: Worker, files: Files, drawn: Generated, compared: Compared, tabs: gr.Tabs) -> None:
    """Wire the button: fill in the settings of the picture that is shown (of several, the one that was opened last),
    switch to Compare, and start."""
    opened = gr.State(0)  # its place among them

    def note_opened(event: gr.SelectData) -> int:
        return max(event.index, 0) if isinstance(event.index, int) else 0

    drawn.gallery.select(note_opened, None, opened, api_visibility="private", **QUICK)
    drawn.run.then(lambda: 0, None, opened, api_visibility="private", **QUICK)

    def fill(records: Any, opened: int) -> tuple[Any, ...]:
        try:
            if not isinstance(records, list) or not records:
                raise ValueError("draw a picture first")
            settings = settings_of_record(records[min(opened, len(records) - 1)], worker.models, worker.limits)
        except (ValueError, TypeError) as error:
            raise toast(error) from None
        found = dict(zip(SETTINGS, updates(worker, settings, files), strict=True))
        found["acceleration"] = gr.skip()  # `follow` keeps those that work for the model
        found["num_images"] = min(LEAST, worker.limits.images)
        same = [settings["prompt"], settings["model"], settings["seed"]]  # Generate's, since both tabs have one
        return gr.Tabs(selected="compare"), *same, *found.values()

    outputs = [tabs, *drawn.found.shared(), *compared.found.all()]
    filled = drawn.compare.click(fill, [drawn.records, opened], outputs, api_visibility="private", **TOLD)
    followed = filled.then(*compared.found.follow, api_visibility="private", **QUICK)
    followed.then(None, None, None, js=PRESS, api_visibility="private")
