"""The line that shows how long a job would take, kept up to date."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import gradio as gr

from diffattn.app.jobs import Worker
from diffattn.app.page.inputs import Inputs
from diffattn.app.page.shared import QUICK, duration, given_or_own, in_words, line
from diffattn.app.page.sizes import small_gain

REPEAT_SECONDS = 5


@dataclass(frozen=True)
class Estimate:
    """How long a job would take, or why it would be refused."""

    words: str
    seconds: float | None = None  # None: not known yet, or refused
    pictures: int | None = None  # that the job draws; None: refused
    error: str | None = None  # None: not refused

    @classmethod
    def refused(cls, error: Exception) -> Self:
        """That of a job whose inputs raise this error."""
        words = in_words(error)
        return cls(words, error=words)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the words, as JSON types."""
        return {"seconds": self.seconds, "pictures": self.pictures, "error": self.error}


def keep_estimated(
    page: gr.Blocks,
    shown: gr.HTML,
    estimate: Callable[..., Estimate],
    counted: Sequence[Any],
    run: Any,
    api_name: str | None = None,
) -> None:
    """Keep `shown` showing what `estimate` returns for the inputs `counted`.

    It is updated at the start, after every change of the inputs and after the event `run` (which measures the pace),
    and every few seconds while no time is known, since the first model may be warming up.

    Args:
        api_name: of the endpoint, which also gives the estimate as data; None: it is private.
    """

    def text(*given: Any) -> str:
        return line(estimate(*given).words)

    @wraps(estimate)
    def answer(*given: Any) -> tuple[str, dict[str, Any]]:
        found = estimate(*given)
        return line(found.words), found.to_dict()

    def again(*given: Any) -> tuple[str, gr.Timer]:
        found = estimate(*given)
        return line(found.words), gr.Timer(active=found.seconds is None)

    inputs: list[Any] = list(counted)
    changes: list[Any] = [page.load, *(component.change for component in inputs)]
    if api_name is None:
        gr.on(changes, text, inputs, shown, trigger_mode="always_last", api_visibility="private", **QUICK)
    else:
        data = gr.JSON(label="Estimate", visible=False)
        gr.on(changes, answer, inputs, [shown, data], trigger_mode="always_last", api_name=api_name, **QUICK)
    run.then(text, inputs, shown, api_visibility="private", **QUICK)
    timer = gr.Timer(REPEAT_SECONDS)
    timer.tick(again, inputs, [shown, timer], api_visibility="private", **QUICK)


def wire_time(page: gr.Blocks, worker: Worker, found: Inputs, shown: gr.HTML, run: Any) -> None:
    """Keep the time estimate up to date, for pictures that are each drawn once."""

    def estimate(
        model: str, steps: float, width: float | None = None, height: float | None = None, num_images: float = 1,
        acceleration: str = "automatic",
    ) -> Estimate:  # fmt: skip
        """How long drawing would take, as a line (HTML) and as data: seconds (null: not known yet), pictures, and the
        error if it would be refused."""
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
        return Estimate.refused(error)
    about = "known after the first run of this kind and size" if seconds is None else f"about {duration(seconds)}"
    drawn = request.num_images * (1 + len(beside or ()))
    count = "" if beside is None else f", for {drawn} pictures"
    own = worker.models.describe(model).size or (0, 0)
    advice = small_gain(worker, model, request.width or own[0], request.height or own[1])
    return Estimate(f"Time: {about}{count}.{advice}", seconds, drawn)
