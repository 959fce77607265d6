"""The line that shows how long a job would take, kept up to date."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.page.inputs import Inputs
from diffattn.app.page.shared import QUICK, duration, given_or_own, line

REPEAT_SECONDS = 5

Estimate = tuple[str, bool]  # the line; whether it gives a time


def keep_estimated(
    page: gr.Blocks,
    shown: gr.HTML,
    estimate: Callable[..., Estimate],
    counted: Sequence[Any],
    run: Any,
    **endpoint: Any,
) -> None:
    """Keep `shown` showing what `estimate` returns for the inputs `counted`.

    It is updated at the start, after every change of the inputs and after the event `run` (which measures the pace),
    and every few seconds while no time is known, since the first model may be warming up.

    Args:
        endpoint: `api_name` and `api_visibility` of the endpoint.
    """

    @wraps(estimate)
    def text(*given: Any) -> str:
        return line(estimate(*given)[0])

    def again(*given: Any) -> tuple[str, gr.Timer]:
        words, known = estimate(*given)
        return line(words), gr.Timer(active=not known)

    inputs: list[Any] = list(counted)
    gr.on(
        [page.load, *(component.change for component in inputs)], text, inputs, shown, trigger_mode="always_last",
        **endpoint, **QUICK,
    )  # fmt: skip
    run.then(text, inputs, shown, api_visibility="private", **QUICK)
    timer = gr.Timer(REPEAT_SECONDS)
    timer.tick(again, inputs, [shown, timer], api_visibility="private", **QUICK)


def wire_time(page: gr.Blocks, worker: Worker, found: Inputs, shown: gr.HTML, run: Any) -> None:
    """Keep the time estimate up to date, for pictures that are each drawn once."""

    def estimate(model: str, steps: float, width: float | None, height: float | None, num_images: float) -> Estimate:
        return time_of_drawing(worker, model, steps, width, height, num_images)

    counted = [found.model, found.steps, found.width, found.height, found.num_images]
    keep_estimated(page, shown, estimate, counted, run, api_name="estimate")


def time_of_drawing(
    worker: Worker, model: Any, steps: Any, width: Any, height: Any, pictures: Any, variants: int = 1
) -> Estimate:
    """The time of a job that draws every picture `variants` times, or the error in its inputs."""
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
