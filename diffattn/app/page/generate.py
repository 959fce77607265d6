"""The tab that draws."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffattn.app.jobs import Drawn, JobProgress, Stopped, Worker
from diffattn.app.jobs.restore import as_recorded
from diffattn.app.jobs.suited import own_method, plain_name
from diffattn.app.jobs.worker import save_pictures
from diffattn.app.page.files import Files
from diffattn.app.page.first_view import first_view
from diffattn.app.page.guard import visitor_of
from diffattn.app.page.history import Entry, caption, entries, remembered, strip, wire_history
from diffattn.app.page.inputs import Inputs, inputs, request_of, wire_about
from diffattn.app.page.kept_settings import wire_drop, wire_reload
from diffattn.app.page.shared import JOB, QUICK, busy, columns, duration, left_out, note, progress_html, with_toasts
from diffattn.app.page.time_line import wire_time

EMPTY = "The picture appears here."
MEASURED = (
    "Measured earlier: the same picture with exact and with accelerated attention. Move the line between them; "
    "yours will appear here."
)

TAB = "generate"

SOON = 1.0  # seconds that a small model's job takes: no message is needed meanwhile


@dataclass(frozen=True)
class Generated:
    """The parts of the tab that others use."""

    found: Inputs
    run: Any  # the event that ends a run, after which the latest trace is known
    compare: gr.Button  # "Compare this picture"
    records: gr.JSON  # of the pictures that are shown
    gallery: gr.Gallery  # these pictures


def tab(page: gr.Blocks, worker: Worker, files: Files, latest: gr.State, stored: gr.BrowserState) -> Generated:
    """Lay out the tab; after a run `latest` holds its trace. Its settings are kept in `stored`."""
    history, restored = gr.State([]), gr.State(None)  # pictures drawn; the record whose settings were restored
    with columns() as (ask, result, rest):
        found = inputs(worker, ask, rest, several=False)
        with ask:
            go = gr.Button("Generate (Ctrl+Enter)", variant="primary", elem_classes="diffattn-go", elem_id="generate")
            time = gr.HTML("", elem_id="generate-time")
        with result:
            shown_first = first_view(worker)
            stage = gr.HTML(note(MEASURED if shown_first else EMPTY), elem_id="stage")
            halt = gr.Button("Stop", variant="stop", elem_id="stop", elem_classes="diffattn-stop")
            if shown_first:
                gr.HTML(shown_first, elem_id="first")
            gallery = gr.Gallery(
                label="Pictures", show_label=False, format="png", type="filepath", interactive=False, columns=2,
                object_fit="contain", height="auto", elem_id="gallery", elem_classes="diffattn-pictures",
            )  # fmt: skip
            compare = gr.Button(
                "Compare this picture with exact attention", elem_id="compare-this", elem_classes="diffattn-after"
            )
            earlier = strip()
            saved = gr.File(
                label="PNG files, each with its record inside", file_count="multiple", interactive=False,
                elem_classes="diffattn-after",
            )  # fmt: skip
            code = gr.Code(
                label="The same in Python", language="python", interactive=False, wrap_lines=True, buttons=["copy"],
                elem_classes="diffattn-after",
            )  # fmt: skip
            records = gr.JSON(label="Records of the pictures", visible=False)
        with rest:
            dropped = gr.File(
                label="Drop a PNG to restore its settings", file_types=[".png"], file_count="single",
                type="filepath", height=170, elem_id="drop",
            )  # fmt: skip
    draw = _drawing(worker, files)
    outputs = [stage, gallery, saved, code, records, latest, history]
    given: list[Any] = [*found.all(), history, restored]
    run = gr.on([go.click, found.prompt.submit], draw, given, outputs, api_name="generate", **JOB)
    halt.click(stopper(worker, TAB), None, stage, api_visibility="private", **QUICK)
    whether = gr.JSON(label="Stopped", visible=False)
    gr.Button(visible=False).click(stopping(worker), None, [stage, whether], api_name="stop", **QUICK)  # for programs
    found.renew_seed(run)
    wire_about(worker, found)
    wire_time(page, worker, found, time, run)
    wire_history(worker, found, files, history, earlier, run, [stage, gallery, saved, code, records], restored)
    wire_drop(worker, found, files, dropped, stage, restored)
    wire_reload(page, worker, found, files, stored, several=False)
    return Generated(found, run, compare, records, gallery)


def _drawing(worker: Worker, files: Files) -> Any:
    """The handler that draws. What earlier runs left stays until the first new picture is there."""

    @with_toasts(7)
    def draw(
        request: gr.Request, prompt: str, model: str, acceleration: str, steps: float, guidance: float | None = None,
        width: float | None = None, height: float | None = None, seed: float = 0, num_images: float = 1,
        negative_prompt: str = "", recipe: str | None = None, history: Sequence[Entry] = (),
        restored: Mapping[str, Any] | None = None,
    ) -> Generator[tuple[Any, ...]]:  # fmt: skip
        """Draw pictures. Returns a line about the run (HTML), the pictures, their PNG files, Python code that draws
        them, and their records with the seconds that each took."""
        given = [prompt, model, acceleration, steps, guidance, width, height, seed, num_images, negative_prompt, recipe]
        asked = as_recorded(request_of(worker, given), restored, worker.models, worker.limits)
        blank, paths = [gr.skip()] * 6, []
        place, before = files.subfolder(), list(history)  # adding a picture keeps those before it
        yield busy("Starting …"), *blank
        try:
            for event in worker.generate(visitor_of(request, TAB), asked):
                if isinstance(event, JobProgress):
                    yield progress_html(event), *blank
                elif isinstance(event, Drawn):
                    paths += save_pictures(event.pictures[len(paths) :], place)
                    yield _shown(worker, event, paths, before)
        except Stopped:
            yield note("Stopped. Change something and press Generate again."), *blank

    return draw


def _shown(worker: Worker, drawn: Drawn, paths: Sequence[Any], before: Sequence[Entry]) -> tuple[Any, ...]:
    """The outputs after a picture: words, pictures, files, code, records, trace, history."""
    items = [(str(path), caption(picture.record)) for path, picture in zip(paths, drawn.pictures, strict=True)]
    words, done = _summary(worker, drawn), len(items) == drawn.request.num_images
    return (
        note(words) if done else busy(words),
        items,
        [str(path) for path in paths],
        drawn.code,
        [dict(picture.record) | {"seconds": picture.seconds} for picture in drawn.pictures],
        drawn.trace.to_dict(),
        remembered(before, entries(drawn, paths)),
    )


def stopper(worker: Worker, tab: str) -> Any:
    """Handle a tab's Stop button, for the jobs that the visitor started in that tab; their last message stays."""

    def halt(request: gr.Request) -> Any:
        session = _session(request)
        if not worker.stop(session, tab):
            return note("Nothing is running.")
        return gr.skip() if worker.ended(session, SOON, tab) else busy("Stopping after the current step …")

    return halt


def stopping(worker: Worker) -> Any:
    """The Stop endpoint for programs: stops all their jobs without waiting, and reports whether there were any."""

    def stop(request: gr.Request) -> tuple[str, dict[str, bool]]:
        """Stop all jobs of this client. Returns whether there were any, as a line (HTML) and as data."""
        stopped = worker.stop(_session(request))
        return note("Stopped." if stopped else "Nothing is running."), {"stopped": stopped}

    return stop


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _summary(worker: Worker, drawn: Drawn) -> str:
    seconds = sum(picture.seconds for picture in drawn.pictures)
    done, asked = len(drawn.pictures), drawn.request
    which = f"{done} of {asked.num_images} pictures" if asked.num_images > 1 else "Done"
    name = f"{asked.method}/{asked.preset}" if asked.preset else str(asked.method)
    way = plain_name(name, own_method(worker.models.place(asked.model))) if drawn.report else "exact attention"
    ran = f": {drawn.report.layers_accelerated} layers ran accelerated" if drawn.report else ""
    blanked = sum(picture.blanked for picture in drawn.pictures)
    black = f"; {blanked} of {done} blanked by the model's safety checker" if blanked else ""
    took = duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
    return f"{which} in {took} with {way}{ran}{black}.{left_out(drawn.unread)}"
