"""A visitor's measured runs, kept in the browser: they survive a reload."""

from typing import Any

import gradio as gr

from diffattn.app.jobs import QualityRun
from diffattn.app.jobs.kept import MOST

KEY = "diffattn-runs"


def stored_in_browser() -> gr.BrowserState:
    """Runs as JSON types. The key to their encryption need not be secret: they are the visitor's own."""
    return gr.BrowserState([], storage_key=KEY, secret=KEY)


def checked(found: Any) -> list[QualityRun]:
    """The latest valid runs in untrusted data from a browser; anything else is dropped."""
    runs: dict[str, QualityRun] = {}
    for data in found[-MOST:] if isinstance(found, list) else ():
        try:
            run = QualityRun.from_dict(data)
        except ValueError:
            continue
        runs[run.title] = run
    return list(runs.values())
