"""A visitor's measured runs, kept in the browser: they survive a reload."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from diffattn.app.jobs import QualityRun
from diffattn.app.jobs.kept import MOST

KEY = "diffattn-runs"


@dataclass
class RunsShown:
    """What a visitor sees.

    One object per visitor, changed in place by everything they do, so that a measurement's run is added to the runs
    present when it ends rather than to those present when it began.
    """

    ticked: list[str]  # titles of the runs shown
    axis: str
    kept: list[dict[str, Any]] = field(default_factory=list)  # their own runs, as JSON types

    def choose(self, ticked: list[str], axis: str) -> None:
        """Take over what the page shows now."""
        self.ticked, self.axis = ticked, axis


def stored_in_browser() -> gr.BrowserState:
    """Runs as JSON types. The encryption key need not be secret, since the runs are the visitor's own."""
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
