"""The tab that shows the time steps of a visitor's latest runs."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from diffattn.app.jobs import RunTrace, Worker
from diffattn.app.jobs.suited import plain_name
from diffattn.app.page.charts import steps_chart
from diffattn.app.page.shared import QUICK, WORD, cut, note, toast

EMPTY = "Draw something under Generate or Compare first: its steps are shown here."
GENERATED, COMPARED = "Generate", "Compare: "

Trace = Mapping[str, Any]


def tab(worker: Worker, latest: gr.State, traces: gr.State, drawn: Any, compared: Any) -> None:
    """Lay out the tab; it is redrawn after the events `drawn` and `compared`.

    Args:
        worker: for the run that is stored with the models, which is shown until a visitor has drawn.
        latest: trace of the latest run under Generate.
        traces: name -> trace of the variants of the latest comparison.
    """
    gr.Markdown(
        "How many agents or mediators every step ran with, how much the latents still changed, and which layers ran "
        "accelerated, in the last picture of your latest run. Hover over a box to see its step and layer."
    )
    nothing_yet = _nothing_yet(worker.stored_steps())
    # Custom values are allowed because API clients trigger no chained events, so the server knows no choices for them.
    which = gr.Dropdown([GENERATED], value=GENERATED, label="Run", allow_custom_value=True)
    chart = gr.HTML(nothing_yet, elem_id="steps-chart")
    with gr.Accordion("As JSON", open=False, visible=False) as behind:
        data = gr.JSON(None, label="Per step")

    def time_steps(run: str, latest: Trace | None, traces: Mapping[str, Trace]) -> tuple[str, Trace | None]:
        """The steps of one of this client's latest runs ("Generate", or "Compare: " and an acceleration), as a chart
        (HTML) and as data."""
        if run == GENERATED and latest is None:
            return nothing_yet, None
        runs = {COMPARED + name: found for name, found in traces.items()} | ({GENERATED: latest} if latest else {})
        if not isinstance(run, str) or run not in runs:
            has = ", ".join(runs) or "none yet"
            raise toast(ValueError(f"no such run: {cut(repr(run), WORD)}; this client's latest runs: {has}"))
        trace = runs[run]
        return _scrolling(steps_chart(RunTrace.from_dict(trace))), trace

    def redrawn(run: str, latest: Trace | None, traces: Mapping[str, Trace]) -> tuple[Any, ...]:
        drawing, trace = time_steps(run, latest, traces)
        return drawing, trace, gr.Accordion(visible=trace is not None)

    def after_comparison(latest: Trace | None, traces: Mapping[str, Trace]) -> tuple[Any, ...]:
        names = [(GENERATED, GENERATED), *((COMPARED + plain_name(name), COMPARED + name) for name in traces)]
        run = names[2][1] if len(names) > 2 else GENERATED  # the first is the exact one
        return gr.Dropdown(names, value=run), *redrawn(run, latest, traces)

    def after_drawing(latest: Trace | None, traces: Mapping[str, Trace]) -> tuple[Any, ...]:
        return GENERATED, *redrawn(GENERATED, latest, traces)

    shown = [which, chart, data, behind]
    drawn.then(after_drawing, [latest, traces], shown, api_visibility="private", **QUICK)
    compared.then(after_comparison, [latest, traces], shown, api_visibility="private", **QUICK)
    which.input(time_steps, [which, latest, traces], [chart, data], api_name="time_steps", **QUICK)


def _nothing_yet(stored: RunTrace | None) -> str:
    """What is shown before a visitor has drawn: the stored run, if there is one."""
    if stored is None:
        return note(EMPTY)
    return note(f"Measured earlier: {stored.title}. {EMPTY}") + _scrolling(steps_chart(stored))


def _scrolling(chart: str) -> str:
    return f'<div class="diffattn-scroll" tabindex="0" role="group" aria-label="Steps">{chart}</div>'
