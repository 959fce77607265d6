"""What the tabs share: errors as toasts, progress, tables, the inputs of a request."""

import base64
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from html import escape
from typing import Any

import gradio as gr
import torch

from diffattn.jobs import Progress, Stopped, Worker

log = logging.getLogger("diffattn.webui")

JOB: dict[str, Any] = {"concurrency_id": "job", "concurrency_limit": 1, "show_progress": "minimal"}
"""Of every event that runs a model: one at a time across all tabs and visitors."""

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def told(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A generator whose errors become toasts: bad input in its own words, a bug without its traceback."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from function(*args, **kwargs)
        except Stopped:
            raise
        except Exception as error:
            raise toast(error) from None

    return wrapped


def toast(error: Exception) -> gr.Error:
    """What to tell of an error; one that is not about the input goes to the log with its traceback."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ValueError | TypeError):
        return gr.Error(escape(str(error), quote=False), title="Please change this", print_exception=False)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return gr.Error("Not enough memory: choose a smaller size or fewer pictures.", print_exception=False)
    log.error("a job failed", exc_info=error)
    message = "The job failed; the reason is in the log of the server. Other settings may work."
    return gr.Error(message, title="Something went wrong", print_exception=False)


def progress_html(progress: Progress) -> str:
    """A bar, the step, the time left, and the preview inside the page itself."""
    if not progress.steps:
        return f'<div class="diffattn-stage"><p role="status">{escape(progress.what)} …</p></div>'
    total = progress.steps * progress.pictures
    share = (progress.picture * progress.steps + progress.step) / max(total, 1)
    left = "" if progress.seconds_left is None else f" · about {duration(progress.seconds_left)} left"
    which = f"picture {progress.picture + 1} of {progress.pictures} · " if progress.pictures > 1 else ""
    what = f"{progress.what} · " if progress.what else ""
    text = escape(f"{what}{which}step {progress.step} of {progress.steps}{left}")
    picture = ""
    if progress.preview is not None:
        buffer = io.BytesIO()
        progress.preview.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="preview" src="data:image/png;base64,{data}">'
    bar = f'<div class="diffattn-bar"><div style="width:{100 * share:.1f}%"></div></div>'
    return f'<div class="diffattn-stage"><p role="status">{text}</p>{bar}{picture}</div>'


def note(text: str) -> str:
    """A line where progress is shown."""
    return f'<div class="diffattn-stage"><p role="status">{escape(text)}</p></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways by itself."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="diffattn-table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def duration(seconds: float) -> str:
    """ "8 s" or "2 min 5 s" """
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def estimate(worker: Worker, model: Any, steps: Any, width: Any, height: Any, pictures: Any) -> str:
    """How long a job would take, or what is wrong with it."""
    try:
        worker.models.source(model)
        request = worker.limits.request(model, "", steps=steps, width=width, height=height, num_images=pictures)
        seconds = worker.seconds_for(request)
    except (ValueError, TypeError) as error:
        return str(error)
    about = "unknown until the first picture" if seconds is None else f"about {duration(seconds)}"
    return f"Time: {about}. {worker.limits}"
