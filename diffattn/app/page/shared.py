"""Shared by the tabs: errors as toasts, progress, tables, sliders."""

import base64
import io
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import wraps
from html import escape
from typing import Any

import gradio as gr
import torch

from diffattn.app.jobs import JobProgress, NotFinite
from diffattn.app.jobs.compare import MAX_COUNTED_TOKENS
from diffattn.app.jobs.discretion import without_words

log = logging.getLogger("diffattn.app.page")

WAITING = 64
"""The most jobs that may wait."""

JOB: dict[str, Any] = {"concurrency_id": "job", "concurrency_limit": WAITING, "show_progress": "hidden"}
"""Arguments of every event that runs a model. One runs at a time across all tabs and visitors. They wait in the queue
of `Worker` rather than Gradio's, so that Stop reaches waiting jobs and they can show how many are ahead of them, and
without Gradio's progress, since the page has its own."""

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}

TOLD: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
"""Arguments of quick events that may fail: outside its queue Gradio shows no toasts."""

OWN = "the model's own"
PROMPTS = ("T-Rex", "green heart", "tent", "footprints", "man vampire")
"""Examples for models that draw from text."""

BUG = "Something went wrong"
MESSAGE, WORD = 600, 80  # characters of a message, and of a word or a value in it

_LONG = re.compile(rf"(?<!\S)(['\"])(?:(?!\1).){{{WORD},}}\1|\S{{{WORD + 1},}}", re.DOTALL)
"""A quoted value, or a word, that is longer."""

UNCOUNTED = (
    f"GFLOPs are counted up to {MAX_COUNTED_TOKENS:,} latent pixels, and not for schedules by the change of the "
    "latents; “–”: not counted."
)


Events = Callable[..., Iterator[tuple[Any, ...]]]


def with_toasts(outputs: int) -> Callable[[Callable[..., Generator[tuple[Any, ...]]]], Events]:
    """Turn the errors of a generator into toasts: bad input with its message, a bug without its traceback.

    The first of the outputs shows progress; the error stays readable there after the toast has gone. All others stay
    as they are.
    """

    def decorate(function: Callable[..., Generator[tuple[Any, ...]]]) -> Events:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
            try:
                with closing(function(*args, **kwargs)) as events:
                    yield from events
            except Exception as error:
                title, message = _words(error)
                yield note(f"{title}: {message}"), *[gr.skip()] * (outputs - 1)
                raise toast(error) from None

        return wrapped

    return decorate


def toast(error: Exception) -> gr.Error:
    """The toast for an error; the stack of one that is not about the input also goes to the log.

    A ValueError or TypeError counts as being about the input. One raised while a pipeline draws may still be a
    bug, so `Watch` logs it too.
    """
    title, message = _words(error)
    if title == BUG:
        log.error("a job failed\n%s", without_words(error))
    return gr.Error(escape(message, quote=False), title=title, print_exception=False)


def in_words(error: Exception) -> str:
    """The message of an error about the input, with long values cut."""
    message = str(error.message if isinstance(error, gr.Error) else error)
    return cut(_LONG.sub(lambda value: cut(value[0], WORD), message), MESSAGE)


def _words(error: Exception) -> tuple[str, str]:
    """Title and message."""
    if isinstance(error, NotFinite):
        return "The model failed", str(error)
    if isinstance(error, ValueError | TypeError | gr.Error):  # the last of a component that refuses its value
        return "Please change this", in_words(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "Not enough memory", "choose a smaller size or fewer pictures."
    return BUG, "the job failed; see the server's log for the reason. Other settings may work."


def progress_html(progress: JobProgress) -> str:
    """A progress bar, the step, the time left, and the preview embedded in the page."""
    if progress.ahead:
        jobs = "1 job runs" if progress.ahead == 1 else f"{progress.ahead} jobs run"
        return busy(f"Waiting: {jobs} before yours. Press Stop to leave the queue.")
    if not progress.steps:
        return busy(f"{progress.what} …")
    total = progress.steps * progress.pictures
    share = (progress.picture * progress.steps + progress.step) / max(total, 1)
    left = "" if progress.seconds_left is None else f" · about {duration(progress.seconds_left)} left"
    which = f"picture {progress.picture + 1} of {progress.pictures} · " if progress.pictures > 1 else ""
    what = f"{progress.what} · " if progress.what else ""
    text = f"{what}{which}step {progress.step} of {progress.steps}{left}"
    bar = f'<div class="diffattn-bar"><div style="width:{100 * share:.1f}%"></div></div>'
    picture = ""
    if progress.preview is not None:
        buffer = io.BytesIO()
        progress.preview.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img class="diffattn-preview" alt="preview" src="data:image/png;base64,{data}">'
    return busy(text, bar + picture)


def busy(text: str, below: str = "") -> str:
    """A line where progress is shown while something runs; the Stop button is visible meanwhile. `below` is HTML."""
    return f'<div class="diffattn-stage diffattn-busy"><p role="status">{escape(text)}</p>{below}</div>'


def note(text: str) -> str:
    """A line where progress is shown."""
    return f'<div class="diffattn-stage"><p role="status">{escape(text)}</p></div>'


def line(text: str) -> str:
    """A line of text, as HTML."""
    return f'<p class="diffattn-line">{escape(text)}</p>'


@contextmanager
def columns() -> Iterator[tuple[gr.Column, gr.Column, gr.Column]]:
    """Three columns: the main inputs, the result, and everything else.

    In a wide window the second is beside the two others; in a narrow one they follow each other in this order.
    """
    with gr.Row(elem_classes="diffattn-split"):
        with gr.Column(min_width=280, elem_classes="diffattn-ask") as ask:
            pass
        with gr.Column(min_width=280, elem_classes="diffattn-result") as result:
            pass
        with gr.Column(min_width=280, elem_classes="diffattn-rest") as rest:
            pass
    yield ask, result, rest


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways on its own."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    focusable = 'tabindex="0" role="group" aria-label="Table"'  # so that the keyboard can scroll it
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="diffattn-table" {focusable}>{inside}</div>'


def cut(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def left_out(unread: str) -> str:
    """A note on the end of a prompt that the model does not read; empty if it reads all."""
    if not unread:
        return ""
    return f" The prompt was cut, since the model reads no further; left out: “{cut(unread, WORD)}”."


def duration(seconds: float) -> str:
    """ "8 s" or "2 min 5 s"; at least "1 s" """
    whole = max(round(seconds), 1)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def whole_numbers(least: int, most: int, start: int, **shown: Any) -> gr.Slider:
    """A slider from `least` to `most` that starts at `start`, clipped to that range.

    Gradio has no slider for a single value: if both are equal, it cannot be moved.
    """
    within = max(least, min(start, most))
    return gr.Slider(least, max(most, least + 1), within, step=1, interactive=most > least, **shown)


def given_or_own(value: Any) -> Any:
    """None (the model's own value) for an empty number field; Gradio sends 0 for one that was shown."""
    return None if value == 0 else value
