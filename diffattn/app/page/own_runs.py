"""Deleting and renaming a visitor's own runs."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from diffattn.app.jobs.kept import renamed, without
from diffattn.app.page.shared import TOLD, toast


def own_runs(
    now: Sequence[Any], outputs: Sequence[Any], change: Callable[[Any, Any, list[str]], tuple[Any, ...]]
) -> list[Any]:
    """Lay out the buttons; returns the events after which the visitor's runs have changed.

    Args:
        now: components of the visitor, the runs ticked, and the axis.
        outputs: components that change with the runs.
        change: takes the visitor, their new runs and the titles that are ticked then; gives the outputs.
    """
    with gr.Accordion("Delete or rename your runs", open=False), gr.Row(equal_height=True):
        name = gr.Textbox("", label="New name of the run that is ticked", max_length=80)
        rename = gr.Button("Rename", elem_id="rename-run")
        delete = gr.Button("Delete your ticked runs", elem_id="delete-runs")

    def drop(visitor: Any, ticked: list[str], axis: str) -> tuple[Any, ...]:
        visitor.choose(ticked, axis)
        return change(visitor, without(visitor.kept, ticked), ticked)

    def call(visitor: Any, ticked: list[str], axis: str, name: str) -> tuple[Any, ...]:
        visitor.choose(ticked, axis)
        try:
            kept = renamed(visitor.kept, ticked, name)
        except ValueError as error:
            raise toast(error) from None
        return change(visitor, kept, [*ticked, name.strip()])

    hidden: dict[str, Any] = {"api_visibility": "private"} | TOLD
    return [
        delete.click(drop, [*now], [*outputs], **hidden),
        rename.click(call, [*now, name], [*outputs], **hidden),
    ]
