"""The line that shows how long a job would take, kept up to date."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.page.inputs import Inputs
from diffattn.app.page.shared import QUICK, duration, given_or_own, in_words, line
from diffattn.app.page.sizes import small_gain

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

    def estimate(
        model: str, steps: float, width: float | None = None, height: float | None = None, num_images: float = 1,
        acceleration: str = "automatic",
    ) -> Estimate:  # fmt: skip
        """How long drawing would take (HTML), once that is known."""
        return time_of_drawing(worker, model, steps, width, height, num_images, acceleration)

    counted = [found.model, found.steps, found.width, found.height, found.num_images, found.acceleration]
    keep_estimated(page, shown, estimate, counted, run, api_name="estimate")


def time_of_drawing(
    worker: Worker, model: Any, steps: Any, width: Any, height: Any, pictures: Any, acceleration: Any = "none",
    beside: Sequence[str] | None = None,
) -> Estimate:  # fmt: skip
    """The time of a job, or the error in its inputs.

    Args:
        worker, model, steps, width, height, pictures, acceleration: as the page's inputs give them.
        beside: accelerations that are compared with exact attention; None: no comparison.
    """
    try:
        worker.models.source(model)
        request = worker.limits.request(
            model, "", steps=steps, width=given_or_own(width), height=given_or_own(height), num_images=pictures,
            acceleration=acceleration,
        )  # fmt: skip
        if beside is None:
            seconds = worker.estimates.seconds_for(request)
        else:
            seconds = worker.estimates.seconds_to_compare(request, beside)
    except (ValueError, TypeError) as error:
        return in_words(error), False
    about = "known after the first run of this kind and size" if seconds is None else f"about {duration(seconds)}"
    count = "" if beside is None else f", for {request.num_images * (1 + len(beside))} pictures"
    own = worker.models.describe(model).size or (0, 0)
    advice = small_gain(worker, model, request.width or own[0], request.height or own[1])
    return f"Time: {about}{count}.{advice}", seconds is not None
