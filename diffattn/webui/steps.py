"""The tab that shows what the time steps of a visitor's latest run did."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from diffattn.jobs import RunTrace
from diffattn.webui.charts import steps_chart
from diffattn.webui.shared import QUICK, note

EMPTY = "Draw something under Generate first: its steps are shown here."


def tab(latest: gr.State, drawn: Any) -> None:
    """Lay it out; drawn anew after the event `drawn`."""
    gr.Markdown(
        "How many agents or mediators every step ran with, how much the latents still changed, and which layers ran "
        "accelerated in your latest run under Generate. Point at a box for its step and layer."
    )
    chart = gr.HTML(note(EMPTY), elem_id="steps-chart")
    with gr.Accordion("As JSON", open=False):
        data = gr.JSON(None, label="Per step")

    def time_steps(trace: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any] | None]:
        if trace is None:
            return note(EMPTY), None
        return f'<div class="diffattn-scroll">{steps_chart(RunTrace.from_dict(trace))}</div>', trace

    drawn.then(time_steps, latest, [chart, data], api_name="time_steps", **QUICK)
