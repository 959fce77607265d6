"""The tab that draws the same pictures exact and accelerated."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import gradio as gr

from diffattn.app.jobs import Comparison, JobProgress, Stopped, Worker
from diffattn.app.jobs.worker import save_pictures
from diffattn.app.page.files import Files
from diffattn.app.page.generate import stopper
from diffattn.app.page.inputs import Inputs, inputs, request_of
from diffattn.app.page.shared import JOB, QUICK, UNCOUNTED, note, progress_html, table, with_toasts
from diffattn.app.page.time_line import Estimate, keep_estimated, time_of_drawing

HEAD = (
    "acceleration",
    "s per picture",
    "speed-up",
    "GFLOPs per picture",
    "peak MiB (GPU)",
    "PSNR dB",
    "SSIM",
    "layers",
)

BLANKED = "{} pictures were blanked by the model's safety checker; their pairs count for neither PSNR nor SSIM."
UNMEASURED = "Peak memory is measured on CUDA devices only."


def tab(page: gr.Blocks, worker: Worker, files: Files, traces: gr.State) -> Any:
    """Lay out the tab; returns the event that ends a run, after which `traces` holds its variants' traces by name."""
    with gr.Row(elem_classes="diffattn-split"):
        with gr.Column(scale=2, min_width=320):
            found = inputs(worker, several=True)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                go = gr.Button("Compare (Ctrl+Enter)", variant="primary", elem_classes="diffattn-go", elem_id="compare")
                halt = gr.Button("Stop", variant="stop", elem_id="stop-compare")
            time = gr.Markdown(str(worker.limits), elem_id="compare-time")
            stage = gr.HTML(note("Exact on the left, accelerated on the right."), elem_id="compare-stage")
            shown = gr.Radio([], label="Shown", visible=False)
            slider = gr.ImageSlider(
                label="Exact | accelerated", format="png", type="filepath", interactive=False, slider_position=50,
                elem_id="slider",
            )  # fmt: skip
            figures = gr.HTML()
            with gr.Accordion("What ran in which layer", open=False):
                report = gr.HTML()
            pairs = gr.State({})

    @with_toasts
    def run(
        prompt: str, model: str, accelerations: list[str], steps: float, guidance: float | None, width: float | None,
        height: float | None, seed: float, num_images: float, negative_prompt: str, recipe: str | None,
        request: gr.Request,
    ) -> Generator[tuple[Any, ...]]:  # fmt: skip
        given = [prompt, model, None, steps, guidance, width, height, seed, num_images, negative_prompt, recipe]
        blank = gr.skip()
        yield note("Starting …"), blank, None, "", "", blank, blank
        try:
            names = worker.limits.variants_of(accelerations, recipe is not None)
            asked = request_of(worker, given, acceleration="automatic")
            for event in worker.compare(str(request.session_hash), asked, names):
                if isinstance(event, JobProgress):
                    yield progress_html(event), *[blank] * 6
                elif isinstance(event, Comparison):
                    chosen = _pairs(event, files)
                    first = next(iter(chosen))
                    radio = gr.Radio(list(chosen), value=first, visible=len(chosen) > 1)
                    steps_of = {variant.name: variant.trace.to_dict() for variant in event.variants}
                    yield note("Done."), radio, chosen[first], _figures(event), _reports(event), chosen, steps_of
        except Stopped:
            yield note("Stopped. Change something and press Compare again."), *[blank] * 6

    outputs = [stage, shown, slider, figures, report, pairs, traces]
    done = go.click(run, found.all(), outputs, api_name="compare", **JOB)
    halt.click(stopper(worker), None, stage, api_visibility="private", **QUICK)

    def show(name: str, pairs: dict[str, Any]) -> Any:
        pair = pairs.get(name)
        if pair and not all(Path(path).is_file() for path in pair):
            raise gr.Error("These pictures are no longer on the server: press Compare again.", print_exception=False)
        return pair

    shown.input(show, [shown, pairs], slider, api_name="show_pair", **QUICK)
    _wire_time(page, worker, found, time, done)
    return done


def _wire_time(page: gr.Blocks, worker: Worker, found: Inputs, time: gr.Markdown, run: Any) -> None:
    """Keep the time estimate up to date, for pictures drawn by every variant."""

    def estimate(
        model: str, steps: float, width: float | None, height: float | None, num_images: float, chosen: list[str],
        recipe: str | None,
    ) -> Estimate:  # fmt: skip
        try:
            variants = 1 + len(worker.limits.variants_of(chosen, recipe is not None))
        except ValueError as error:
            return str(error), False
        return time_of_drawing(worker, model, steps, width, height, num_images, variants)

    counted = [found.model, found.steps, found.width, found.height, found.num_images, found.acceleration, found.recipe]
    keep_estimated(page, time, estimate, counted, run, api_visibility="private")


def _pairs(comparison: Comparison, files: Files) -> dict[str, tuple[str, str]]:
    """Label of a pair -> files of its exact and accelerated picture."""
    exact, *others = ((v.name, save_pictures(v.pictures, files.subfolder())) for v in comparison.variants)
    several = comparison.request.num_images > 1
    return {
        name + (f", seed {comparison.request.seed + i}" if several else ""): (str(exact[1][i]), str(path))
        for name, paths in others
        for i, path in enumerate(paths)
    }


def _figures(comparison: Comparison) -> str:
    rows = []
    for v in comparison.variants:
        db = "–" if v.psnr is None else "identical" if math.isinf(v.psnr) else f"{v.psnr:.1f}"
        layers = f"{v.report.layers_accelerated} of {v.report.layers_patched} accelerated" if v.report else "exact"
        rows.append(
            (v.name, f"{v.seconds:.2f}", f"{comparison.speedup(v):.2f}×", _or_dash(v.gflops, ".1f"),
             _or_dash(v.peak_mib, ".0f"), db, _or_dash(v.ssim, ".3f"), layers)
        )  # fmt: skip
    count = comparison.request.num_images
    what = "one picture each: times of single pictures vary, draw more for a firm figure"
    below = what if count == 1 else f"median of {count} pictures, drawn in turns"
    blanked = sum(v.blanked for v in comparison.variants)
    missing = [BLANKED.format(blanked)] * bool(blanked)
    missing += [UNMEASURED] * (comparison.variants[0].peak_mib is None)
    missing += [UNCOUNTED] * any(v.gflops is None for v in comparison.variants)
    return table(HEAD, rows) + "".join(map(note, [f"Times: {below}.", *missing]))


def _reports(comparison: Comparison) -> str:
    head, parts = ("layer", "tokens", "calls accelerated", "calls exact", "why exact"), []
    for v in comparison.variants:
        if v.report:
            rows = [
                (x.name, str(x.tokens or "–"), str(x.accelerated), str(sum(x.passed_through.values())), x.note)
                for x in v.report.layers
                if x.left_alone != "cross-attention"
            ]
            parts.append(note(v.name) + table(head, rows))
    return "".join(parts)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
