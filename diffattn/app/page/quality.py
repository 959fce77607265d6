"""The tab that measures speed and quality."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, JobProgress, QualityRun, Stopped, Worker
from diffattn.app.jobs.kept import MOST, keep, not_kept, runs_to_show
from diffattn.app.jobs.quality_run import read_runs, runs_as_csv, save_runs
from diffattn.app.jobs.speed_quality import has_reference
from diffattn.app.page.asked import LISTED, OWN_PROMPTS, SHARED, Asked, asked, measurement_of, wire_prompts
from diffattn.app.page.browser_runs import RunsShown, checked
from diffattn.app.page.files import Files
from diffattn.app.page.generate import stopper
from diffattn.app.page.guard import visitor_of
from diffattn.app.page.kept_settings import keep_over_reload
from diffattn.app.page.own_runs import own_runs
from diffattn.app.page.quality_charts import TIME, WORK, results
from diffattn.app.page.shared import (
    JOB,
    QUICK,
    TOLD,
    busy,
    columns,
    duration,
    note,
    progress_html,
    toast,
    with_toasts,
)
from diffattn.app.page.time_line import Estimate, keep_estimated

INTRO = (
    "Draws N pictures with every acceleration, in turns and with the same prompts and seeds, and measures the time per "
    "picture and the distance to a reference (FID and KID, lower is better). FID grows as N falls: only compare "
    "figures with the same N."
)
TAB = "quality"


@dataclass
class _Parts:
    """What the handlers read and write."""

    found: Asked
    go: gr.Button
    halt: gr.Button
    time: gr.HTML
    stage: gr.HTML
    shown: gr.CheckboxGroup  # titles of the runs to show
    horizontal: gr.Radio
    figures: gr.HTML
    saved: gr.File
    load: gr.File
    own: gr.State  # a `RunsShown`

    @property
    def now(self) -> list[Any]:
        """What the visitor has ticked, in the order in which `RunsShown.choose` takes it, after the visitor."""
        return [self.own, self.shown, self.horizontal]

    @property
    def outputs(self) -> list[Any]:
        """Components that change when runs are added, in the order of `_Shelf.added`."""
        return [self.own, self.shown, self.figures, self.saved]


@dataclass(frozen=True)
class _Shelf:
    """The runs stored with the models; a visitor's own runs are shown beside them."""

    stored: Sequence[QualityRun]
    files: Files

    def shown_now(self, visitor: RunsShown) -> tuple[str, list[str] | None]:
        """Charts and files of the runs that are ticked."""
        chosen = [run for run in runs_to_show(self.stored, visitor.kept) if run.title in visitor.ticked]
        return results(chosen, visitor.axis), _save(chosen, self.files.subfolder()) if chosen else None

    def added(self, visitor: RunsShown, new: Sequence[QualityRun]) -> tuple[Any, ...]:
        """The visitor's state with new runs added, the boxes to tick, charts and files."""
        return self.changed(visitor, keep(visitor.kept, new), [*visitor.ticked, *(run.title for run in new)])

    def changed(self, visitor: RunsShown, kept: list[dict[str, Any]], ticked: Collection[str]) -> tuple[Any, ...]:
        """Like `added`, with other runs of the visitor, of which those of these titles are shown."""
        visitor.kept = kept
        every = [run.title for run in runs_to_show(self.stored, visitor.kept)]
        visitor.ticked = [name for name in every if name in ticked]
        return visitor, gr.CheckboxGroup(every, value=visitor.ticked), *self.shown_now(visitor)


def tab(
    page: gr.Blocks, worker: Worker, files: Files, stored_in_browser: gr.BrowserState, settings: gr.BrowserState,
    prompt: gr.Textbox,
) -> Asked:  # fmt: skip
    """Lay out the tab; the visitor's runs are also kept in the browser.

    Args:
        page, worker, files: of the page.
        stored_in_browser: the visitor's runs.
        settings: where those of the tab are kept.
        prompt: the one that the other tabs share.
    """
    shelf = _Shelf(worker.stored_runs(), files)
    parts = _lay_out(worker, shelf.stored)
    done = _wire_measuring(worker, parts, shelf)
    loaded = _wire_runs(parts, shelf)

    def restore(found: Any, visitor: RunsShown, labels: list[str], axis: str) -> tuple[Any, ...]:
        visitor.choose(labels, axis)
        runs = checked(found)
        return shelf.added(visitor, runs) if runs else (gr.skip(),) * 4

    hidden: dict[str, Any] = {"api_visibility": "private"} | QUICK
    page.load(restore, [stored_in_browser, *parts.now], parts.outputs, **hidden)
    for event in (done, loaded, *own_runs(parts.now, parts.outputs, shelf.changed)):
        event.then(lambda visitor: visitor.kept, parts.own, stored_in_browser, **hidden)

    def estimate(
        models: list[str], accelerations: list[str], numbers: str, samples: float, steps: float,
        guidance: float | None = None, prompts: str = "", extractor: str = AUTOMATIC, against: str = AUTOMATIC,
        seed: float = 0,
    ) -> Estimate:  # fmt: skip
        """How long a measurement would take, as a line (HTML) and as data: seconds (null: not known yet), pictures, and
        the error if it would be refused."""
        given = [models, accelerations, numbers, samples, steps, guidance, prompts, extractor, against, seed]
        return _estimate(worker, given)

    keep_estimated(page, parts.time, estimate, parts.found.all(), done, api_name="estimate_measure")
    wire_prompts(parts.found, prompt)
    restored = _wire_reload(page, worker, parts.found, settings)
    restored.then(*parts.found.follow, **hidden)
    return parts.found


def _wire_reload(page: gr.Blocks, worker: Worker, found: Asked, stored: gr.BrowserState) -> Any:
    """Keep the settings across reloads, see `keep_over_reload`."""

    def shown(values: list[Any]) -> list[Any]:
        *sent, which = values
        measurement_of(worker, sent)
        if which not in (OWN_PROMPTS, SHARED, LISTED):
            raise ValueError(f"no such choice of prompts: {which!r}")
        return values

    return keep_over_reload(page, stored, [*found.all(), found.which], shown)


def _lay_out(worker: Worker, stored: Sequence[QualityRun]) -> _Parts:
    labels = [run.title for run in stored]
    gr.Markdown(INTRO)
    with columns() as (ask, result, rest):
        found = asked(worker, ask, rest, bool(stored))
        with ask:
            go = gr.Button("Measure (Ctrl+Enter)", variant="primary", elem_classes="diffattn-go", elem_id="measure")
            time = gr.HTML("", elem_id="measure-time")
        with result:
            stage = gr.HTML(
                note("Earlier runs are shown below; yours will appear beside them."), elem_id="measure-stage"
            )
            halt = gr.Button("Stop", variant="stop", elem_id="stop-measure", elem_classes="diffattn-stop")
            shown = gr.CheckboxGroup(labels, value=labels, label="Runs shown", elem_id="runs")
            horizontal = gr.Radio([TIME, WORK], value=TIME, label="Horizontal axis")
            figures = gr.HTML(results(stored, TIME), elem_id="results")
    saved = gr.File(
        label="The runs shown, as JSON and CSV", file_count="multiple", interactive=False, elem_id="saved-runs",
        elem_classes="diffattn-filled",
    )  # fmt: skip
    load = gr.File(label="Add runs (JSON)", file_types=[".json"], file_count="single", type="filepath", height=170)
    own = gr.State(RunsShown(labels, TIME))
    return _Parts(found, go, halt, time, stage, shown, horizontal, figures, saved, load, own)


def _wire_measuring(worker: Worker, parts: _Parts, shelf: _Shelf) -> Any:
    """Lay out the Measure and Stop buttons; returns the event that ends a measurement."""

    @with_toasts(5)
    def run(
        request: gr.Request, models: list[str], accelerations: list[str], numbers: str, samples: float, steps: float,
        guidance: float | None = None, prompts: str = "", extractor: str = AUTOMATIC, against: str = AUTOMATIC,
        seed: float = 0, visitor: RunsShown | None = None, labels: Sequence[str] = (), axis: str = TIME,
    ) -> Generator[tuple[Any, ...]]:  # fmt: skip
        """Measure speed and quality. Returns a line about the run (HTML), the titles of the runs shown, their charts
        and tables (HTML), and the files of all their figures (JSON and CSV)."""
        given = [models, accelerations, numbers, samples, steps, guidance, prompts, extractor, against, seed]
        wanted, blank = measurement_of(worker, given), [gr.skip()] * 4
        assert visitor is not None
        visitor.choose(list(labels), axis)
        yield busy("Starting …"), *blank
        try:
            for event in worker.measure(visitor_of(request, TAB), wanted):
                if isinstance(event, JobProgress):
                    yield progress_html(event), *blank
                elif isinstance(event, QualityRun):
                    yield note(_summary(event)), *shelf.added(visitor, [event])
        except Stopped:
            yield note("Stopped: the current run is discarded."), *blank

    given, outputs = [*parts.found.all(), *parts.now], [parts.stage, *parts.outputs]
    done = parts.go.click(run, given, outputs, api_name="measure", **JOB)
    parts.halt.click(stopper(worker, TAB), None, parts.stage, api_visibility="private", **QUICK)
    return done


def _wire_runs(parts: _Parts, shelf: _Shelf) -> Any:
    """Lay out the run selection and the loading of runs from a file; returns the event that ends the loading."""

    def show_runs(labels: list[str], axis: str, visitor: RunsShown) -> tuple[Any, ...]:
        """Charts and tables (HTML) of the runs of these titles, and the files of all their figures (JSON and CSV)."""
        visitor.choose(labels, axis)
        return shelf.shown_now(visitor)

    gr.on(
        [parts.shown.input, parts.horizontal.input], show_runs, [parts.shown, parts.horizontal, parts.own],
        [parts.figures, parts.saved], api_name="show_runs", **QUICK,
    )  # fmt: skip

    def load_runs(path: str | None, visitor: RunsShown, labels: list[str], axis: str) -> tuple[Any, ...]:
        """Add the runs of a JSON file. Returns the titles of the runs shown, their charts and tables (HTML), and the
        files of all their figures (JSON and CSV)."""
        visitor.choose(labels, axis)
        if path is None:
            return (gr.skip(),) * 4
        try:
            new = read_runs(Path(path))
        except ValueError as error:
            raise toast(error) from None
        lost = not_kept(visitor.kept, new)
        said = note(f"The {lost} oldest runs are not kept: the limit is {MOST}.") if lost else ""
        visitor, boxes, charts, made = shelf.added(visitor, new)
        return visitor, boxes, said + charts, made

    return parts.load.upload(load_runs, [parts.load, *parts.now], parts.outputs, api_name="load_runs", **TOLD)


def _summary(run: QualityRun) -> str:
    blanked = {line.acceleration: line.quality.details.get("blanked", 0) for line in run.lines}
    which = ", ".join(f"{count} of {name}" for name, count in blanked.items() if count)
    black = f" Pictures blanked by the model's safety checker are left out: {which}." if which else ""
    return f"Done: {run.title}.{black}"


def _estimate(worker: Worker, given: Sequence[Any]) -> Estimate:
    try:
        wanted = measurement_of(worker, given)
        seconds = worker.estimates.seconds_to_measure(wanted)
        references = sum(not has_reference(name, wanted, worker.models) for name in wanted.models)
    except (ValueError, TypeError) as error:
        return Estimate.refused(error)
    about = "known after an exact picture of each model" if seconds is None else f"about {duration(seconds)}"
    limits, count = worker.limits, wanted.samples * (wanted.num_variants * len(wanted.models) + references)
    words = f"Time: {about}, for {count} pictures. At most N = {limits.samples} and {limits.steps} steps."
    return Estimate(words, seconds, count)


def _save(runs: Sequence[QualityRun], place: Path) -> list[str]:
    save_runs(runs, place / "speed-quality.json")
    (place / "speed-quality.csv").write_text(runs_as_csv(runs), encoding="utf-8", newline="")
    return [str(place / "speed-quality.json"), str(place / "speed-quality.csv")]
