"""The tab that draws."""

from collections.abc import Generator
from typing import Any

import gradio as gr

from diffattn.app.jobs import Drawn, JobProgress, Stopped, Worker
from diffattn.app.jobs.worker import save_pictures
from diffattn.app.page.files import Files
from diffattn.app.page.inputs import describe_model, inputs, request_of, wire_model, wire_time
from diffattn.app.page.shared import JOB, QUICK, duration, note, progress_html, with_toasts

SOON = 1.0  # seconds that a small model's job takes: no message is needed meanwhile


def tab(page: gr.Blocks, worker: Worker, files: Files, latest: gr.State) -> Any:
    """Lay out the tab; returns the event that ends a run, after which `latest` holds its trace."""
    with gr.Row(elem_classes="diffattn-split"):
        with gr.Column(scale=2, min_width=320):
            found = inputs(worker, several=False)
            about = gr.Markdown(describe_model(worker, found.model.value) if found.model.value else "No model.")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                go = gr.Button(
                    "Generate (Ctrl+Enter)", variant="primary", elem_classes="diffattn-go", elem_id="generate"
                )
                halt = gr.Button("Stop", variant="stop", elem_id="stop")
            time = gr.Markdown(str(worker.limits))
            stage = gr.HTML(note("The picture appears here."), elem_id="stage")
            gallery = gr.Gallery(
                label="Pictures", format="png", type="filepath", interactive=False, columns=1, object_fit="contain",
                height="auto", elem_id="gallery",
            )  # fmt: skip
            saved = gr.File(label="PNG files, each with its record inside", file_count="multiple", interactive=False)
            code = gr.Code(label="The same in Python", language="python", interactive=False, wrap_lines=True)

    @with_toasts
    def draw(
        prompt: str, model: str, acceleration: str, steps: float, guidance: float | None, width: float | None,
        height: float | None, seed: float, num_images: float, negative_prompt: str, recipe: str | None,
        request: gr.Request,
    ) -> Generator[tuple[Any, ...]]:  # fmt: skip
        given = [prompt, model, acceleration, steps, guidance, width, height, seed, num_images, negative_prompt, recipe]
        blank, paths = gr.skip(), []
        place = files.subfolder()  # adding a picture keeps those before it
        yield note("Starting …"), [], None, "", blank
        shown = 0
        try:
            for event in worker.generate(_session(request), request_of(worker, given)):
                if isinstance(event, JobProgress):
                    yield progress_html(event), blank, blank, blank, blank
                elif isinstance(event, Drawn):
                    paths += save_pictures(event.pictures[shown:], place)
                    shown = len(event.pictures)
                    names = [str(path) for path in paths]
                    yield note(_summary(event)), names, names, event.code, event.trace.to_dict()
        except Stopped:
            yield note("Stopped. Change something and press Generate again."), blank, blank, blank, blank

    outputs = [stage, gallery, saved, code, latest]
    run = gr.on([go.click, found.prompt.submit], draw, found.all(), outputs,
                api_name="generate", **JOB)  # fmt: skip
    halt.click(stopper(worker), None, stage, api_visibility="private", **QUICK)
    gr.Button(visible=False).click(stopping(worker), None, stage, api_name="stop", **QUICK)  # for programs only
    found.renew_seed(run)
    wire_model(worker, found, about)
    wire_time(page, worker, found, time, run)
    return run


def stopper(worker: Worker) -> Any:
    """Handle Stop for the jobs of the visitor who pressed it; the jobs' own last message stays."""

    def halt(request: gr.Request) -> Any:
        session = _session(request)
        if not worker.stop(session):
            return note("Nothing is running.")
        return gr.skip() if worker.ended(session, SOON) else note("Stopping after the step under way …")

    return halt


def stopping(worker: Worker) -> Any:
    """Stop for programs: reports whether anything was running, and does not wait."""

    def stop(request: gr.Request) -> str:
        return note("Stopped." if worker.stop(_session(request)) else "Nothing is running.")

    return stop


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _summary(drawn: Drawn) -> str:
    seconds = sum(picture.seconds for picture in drawn.pictures)
    done, total = len(drawn.pictures), drawn.request.num_images
    which = f"{done} of {total} pictures" if total > 1 else "Done"
    method = drawn.request.method if drawn.report else "exact attention"
    ran = f": {drawn.report.layers_accelerated} layers ran accelerated" if drawn.report else ""
    blanked = sum(picture.blanked for picture in drawn.pictures)
    black = f"; {blanked} of {done} blanked by the model's safety checker" if blanked else ""
    return f"{which} in {duration(seconds) if seconds >= 10 else f'{seconds:.1f} s'} with {method}{ran}{black}"
