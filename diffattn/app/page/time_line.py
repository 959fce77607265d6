"""The line that says how long a job would take, kept up to date."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.page.shared import QUICK, duration, given_or_own

REPEAT_SECONDS = 5

Told = tuple[str, bool]  # the line; whether it says a time


def keep_told(
    page: gr.Blocks, line: gr.Markdown, tell: Callable[..., Told], counted: Sequence[Any], run: Any, **endpoint: Any
) -> None:
    """Have `line` say what `tell` makes of the inputs `counted`.

    It does so at the start, after every change of them and after the event `run`, from which a pace is learned; and
    every few seconds as long as no time is known, since the first model may be warming up.

    Args:
        endpoint: `api_name` and `api_visibility` of the endpoint.
    """

    @wraps(tell)
    def text(*given: Any) -> str:
        return tell(*given)[0]

    def again(*given: Any) -> tuple[str, gr.Timer]:
        words, known = tell(*given)
        return words, gr.Timer(active=not known)

    inputs: list[Any] = list(counted)
    gr.on(
        [page.load, *(component.change for component in inputs)], text, inputs, line, trigger_mode="always_last",
        **endpoint, **QUICK,
    )  # fmt: skip
    run.then(text, inputs, line, api_visibility="private", **QUICK)
    timer = gr.Timer(REPEAT_SECONDS)
    timer.tick(again, inputs, [line, timer], api_visibility="private", **QUICK)


def time_of_drawing(
    worker: Worker, model: Any, steps: Any, width: Any, height: Any, pictures: Any, variants: int = 1
) -> Told:
    """How long a job would take that draws every picture `variants` times, or what is wrong with it."""
    try:
        worker.models.source(model)
        request = worker.limits.request(
            model, "", steps=steps, width=given_or_own(width), height=given_or_own(height), num_images=pictures
        )
        seconds = worker.seconds_for(request, request.num_images * variants)
    except (ValueError, TypeError) as error:
        return str(error), False
    about = "unknown until the first picture" if seconds is None else f"about {duration(seconds)}"
    count = f", for {request.num_images * variants} pictures" if variants > 1 else ""
    return f"Time: {about}{count}. {worker.limits}", seconds is not None
