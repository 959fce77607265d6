"""The tab that draws the same pictures exact and accelerated."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import Comparison, JobProgress, Stopped, Worker
from diffattn.app.jobs.suited import own_method, plain_name
from diffattn.app.jobs.worker import save_pictures
from diffattn.app.page.before_after import shown_pair
from diffattn.app.page.compare_figures import figures, headline, reports
from diffattn.app.page.files import Files
from diffattn.app.page.generate import stopper
from diffattn.app.page.guard import visitor_of
from diffattn.app.page.inputs import Inputs, inputs, request_of
from diffattn.app.page.kept_settings import wire_reload
from diffattn.app.page.shared import (
    JOB,
    QUICK,
    TOLD,
    busy,
    columns,
    left_out,
    note,
    progress_html,
    with_toasts,
)
from diffattn.app.page.time_line import Estimate, keep_estimated, time_of_drawing

TAB = "compare"


@dataclass(frozen=True)
class Compared:
    """The parts of the tab that others use."""

    found: Inputs
    run: Any  # the event that ends a run, after which the variants' traces are known


def tab(page: gr.Blocks, worker: Worker, files: Files, traces: gr.State, stored: gr.BrowserState) -> Compared:
    """Lay out the tab; after a run `traces` holds its variants' traces by name. Its settings are kept in `stored`."""
    pairs = gr.State({})
    with columns() as (ask, result, rest):
        found = inputs(worker, ask, rest, several=True)
        with ask:
            go = gr.Button("Compare (Ctrl+Enter)", variant="primary", elem_classes="diffattn-go", elem_id="compare")
            time = gr.HTML("", elem_id="compare-time")
        with result:
            stage = gr.HTML(
                note("The same pictures, exact on the left and accelerated on the right."), elem_id="compare-stage"
            )
            halt = gr.Button("Stop", variant="stop", elem_id="stop-compare", elem_classes="diffattn-stop")
            told = gr.HTML("", elem_id="verdict")
            shown = gr.Radio([], label="Shown", visible=False, elem_id="pairs")
            slider = gr.ImageSlider(type="filepath", format="png", interactive=False, visible=False)  # for programs
            both = gr.HTML("", visible=False, elem_id="slider", elem_classes="diffattn-pictures")
            table = gr.HTML("", elem_id="figures")
            with gr.Accordion("What ran in which layer", open=False):
                report = gr.HTML("")
            data = gr.JSON(label="Figures", visible=False)
    outputs = [stage, shown, slider, table, report, data, told, pairs, traces]
    done = go.click(_comparing(worker, files), found.all(), outputs, api_name="compare", **JOB)
    halt.click(stopper(worker, TAB), None, stage, api_visibility="private", **QUICK)
    _wire_pairs(shown, pairs, slider, both, done)
    _wire_time(page, worker, found, time, done)
    wire_reload(page, worker, found, files, stored, several=True)
    return Compared(found, done)


def _comparing(worker: Worker, files: Files) -> Any:
    """The handler that compares. What earlier runs left stays until the new figures are there."""

    @with_toasts(9)
    def run(
        request: gr.Request, prompt: str, model: str, accelerations: list[str], steps: float,
        guidance: float | None = None, width: float | None = None, height: float | None = None, seed: float = 0,
        num_images: float = 3, negative_prompt: str = "", recipe: str | None = None,
    ) -> Generator[tuple[Any, ...]]:  # fmt: skip
        """Draw the same pictures exact and accelerated. Returns a line about the run (HTML), the pairs to choose from,
        the files of the first pair, a table and what ran in which layer (both HTML), all figures as data, and the
        verdict (HTML)."""
        given = [prompt, model, None, steps, guidance, width, height, seed, num_images, negative_prompt, recipe]
        names = worker.limits.variants_of(accelerations, recipe is not None)
        asked, blank = request_of(worker, given, acceleration="automatic"), [gr.skip()] * 8
        yield busy("Starting …"), *blank
        try:
            for event in worker.compare(visitor_of(request, TAB), asked, names):
                if isinstance(event, JobProgress):
                    yield progress_html(event), *blank
                elif isinstance(event, Comparison):
                    yield note(f"Done.{left_out(event.unread)}"), *_shown(worker, event, files)
        except Stopped:
            yield note("Stopped. Change something and press Compare again."), *blank

    return run


def _shown(worker: Worker, found: Comparison, files: Files) -> tuple[Any, ...]:
    """The outputs after a comparison: pairs to choose, the first pair, figures, layers, data, verdict, state."""
    model = found.request.model
    own, size = own_method(worker.models.place(model)), worker.models.describe(model).size
    chosen = _pairs(found, files, own)
    first = next(iter(chosen))
    radio = gr.Radio(list(chosen), value=first, visible=True)
    steps_of = {variant.name: variant.trace.to_dict() for variant in found.variants}
    return (
        radio, chosen[first], figures(found, own, size), reports(found, own), found.to_dict(),
        headline(found, own, size), chosen, steps_of,
    )  # fmt: skip


def _wire_pairs(shown: gr.Radio, pairs: gr.State, slider: gr.ImageSlider, both: gr.HTML, done: Any) -> None:
    """Show the pair that is chosen."""

    def show(name: str, pairs: dict[str, Any]) -> Any:
        """The files of a pair of this client's latest comparison, exact and accelerated."""
        pair = pairs.get(name)
        if pair and not all(Path(path).is_file() for path in pair):
            raise gr.Error("These pictures are no longer on the server: press Compare again.", print_exception=False)
        return pair

    def draw(name: str, pairs: dict[str, Any]) -> Any:
        return shown_pair(show(name, pairs), name)

    shown.input(show, [shown, pairs], slider, api_name="show_pair", **TOLD)
    for event in (shown.input, done.then):
        event(draw, [shown, pairs], both, api_visibility="private", **QUICK)


def _wire_time(page: gr.Blocks, worker: Worker, found: Inputs, time: gr.HTML, run: Any) -> None:
    """Keep the time estimate up to date, for pictures drawn by every variant."""

    def estimate(
        model: str, steps: float, width: float | None, height: float | None, num_images: float, chosen: list[str],
        recipe: str | None,
    ) -> Estimate:  # fmt: skip
        try:
            names = worker.limits.variants_of(chosen, recipe is not None)
        except ValueError as error:
            return Estimate.refused(error)
        return time_of_drawing(worker, model, steps, width, height, num_images, beside=names)

    counted = [found.model, found.steps, found.width, found.height, found.num_images, found.acceleration, found.recipe]
    keep_estimated(page, time, estimate, counted, run)


def _pairs(comparison: Comparison, files: Files, own: str | None) -> dict[str, tuple[str, str]]:
    """Label of a pair -> files of its exact and accelerated picture."""
    exact, *others = ((v.name, save_pictures(v.pictures, files.subfolder())) for v in comparison.variants)
    several = comparison.request.num_images > 1
    return {
        plain_name(name, own) + (f", seed {comparison.request.seed + i}" if several else ""): (
            str(exact[1][i]),
            str(path),
        )
        for name, paths in others
        for i, path in enumerate(paths)
    }
