"""The inputs of a request, shared by Generate and Compare."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, Worker, accelerations
from diffattn.app.page.shared import QUICK, given_or_own, toast, whole_numbers
from diffattn.app.page.time_line import Estimate, keep_estimated, time_of_drawing

OWN = "the model's own"
RANDOM = "Math.floor(Math.random() * 2 ** 31)"
PROMPTS = ("T-Rex", "green heart", "tent", "footprints", "man vampire")


@dataclass
class Inputs:
    """Input components, in the order in which the endpoints take them."""

    prompt: gr.Textbox
    model: gr.Dropdown
    acceleration: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Number
    width: gr.Number
    height: gr.Number
    seed: gr.Number
    num_images: gr.Slider
    negative_prompt: gr.Textbox
    recipe: gr.File
    keep_seed: gr.Checkbox | None  # not sent

    def all(self) -> list[Any]:
        """The components whose values are sent."""
        return list(vars(self).values())[:-1]

    def renew_seed(self, run: Any) -> None:
        """After the event `run`, choose a new seed for the next run unless the seed is kept."""
        js = f"(keep, seed) => keep ? seed : {RANDOM}"
        run.then(None, [self.keep_seed, self.seed], self.seed, js=js, api_visibility="private")


def inputs(worker: Worker, several: bool) -> Inputs:
    """Lay out the inputs; `several`: allow more than one acceleration."""
    names, limits = worker.models.names(), worker.limits
    prompt = gr.Textbox(
        PROMPTS[0], label="Prompt", info="What to draw; for a class-conditional model the name of a class.",
        max_length=limits.prompt, lines=2, placeholder="green heart", submit_btn=False,
    )  # fmt: skip
    gr.Examples([[p] for p in PROMPTS], [prompt], label="Examples", api_visibility="private")
    model = gr.Dropdown(
        names, value=names[0] if names else None, label="Model", allow_custom_value=worker.models.hub,
        info="Or type a name from the hub: owner/name." if worker.models.hub else None,
    )  # fmt: skip
    choices, info = accelerations(), "none: exact attention; automatic: the method that suits the model."
    acceleration = gr.Dropdown(
        choices[2:] if several else choices, value=["agent/balanced", "agent/fast"] if several else AUTOMATIC,
        label="Accelerations to compare" if several else "Acceleration", multiselect=several,
        max_choices=limits.variants if several else None,
        info=f"Up to {limits.variants}, each against exact attention." if several else info,
    )  # fmt: skip
    steps = whole_numbers(1, limits.steps, 20, label="Steps")
    num_images = whole_numbers(1, limits.images, 1, label="Pictures", info="Each has the next seed.")
    keep: gr.Checkbox | None = None
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        if not several:
            keep = gr.Checkbox(True, label="Keep the seed", info="Else a new one after every run", min_width=120)
            dice = gr.Button("New seed", size="sm", min_width=80)
            dice.click(None, None, seed, js=f"() => {RANDOM}", api_visibility="private")
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            width = gr.Number(
                None, label="Width", placeholder=OWN, info="Pixels; 0: its own", precision=0, min_width=120
            )
            height = gr.Number(
                None, label="Height", placeholder=OWN, info="Pixels; 0: its own", precision=0, min_width=120
            )
            guidance = gr.Number(None, label="Guidance", placeholder=OWN, info="1: none; 0: its own", min_width=120)
        negative = gr.Textbox("", label="Keep out", info="Negative prompt", max_length=limits.prompt)
        use = "compared too" if several else "instead of the acceleration"
        recipe = gr.File(
            label=f"Recipe (JSON, see diffattn.patch), {use}", file_types=[".json"], file_count="single",
            type="filepath", height=120,
        )  # fmt: skip
    return Inputs(prompt, model, acceleration, steps, guidance, width, height, seed, num_images, negative, recipe, keep)


def request_of(worker: Worker, given: list[Any], acceleration: str | None = None) -> Any:
    """The checked request for the values of `Inputs.all()`."""
    prompt, model, chosen, steps, guidance, width, height, seed, num_images, negative, recipe = given
    worker.models.source(model)
    return worker.limits.request(
        model, prompt, negative_prompt=negative, acceleration=acceleration or chosen, steps=steps,
        guidance=given_or_own(guidance), width=given_or_own(width), height=given_or_own(height), seed=seed,
        num_images=num_images, recipe=recipe,
    )  # fmt: skip


def describe_model(worker: Worker, name: str) -> str:
    """One line about a model, its classes included."""
    try:
        found = worker.models.describe(name)
    except ValueError as error:
        raise toast(error) from None
    size = f", {found.size[0]}×{found.size[1]} pixels" if found.size else ""
    guidance = f", guidance {found.guidance:g}" if found.guidance else ""
    classes = f". Classes: {', '.join(found.classes[:20])}{' …' if len(found.classes) > 20 else ''}"
    return f"{name}: {found.what}{size}{guidance}{classes if found.classes else ''}"


def wire_model(worker: Worker, found: Inputs, about: gr.Markdown) -> None:
    """Keep the line about the model up to date."""

    def tell_model(model: str) -> str:
        return describe_model(worker, model)

    found.model.change(tell_model, found.model, about, api_name="describe_model", **QUICK)


def wire_time(page: gr.Blocks, worker: Worker, found: Inputs, time: gr.Markdown, run: Any) -> None:
    """Keep the time estimate up to date, for pictures that are each drawn once."""

    def estimate(model: str, steps: float, width: float | None, height: float | None, num_images: float) -> Estimate:
        return time_of_drawing(worker, model, steps, width, height, num_images)

    counted = [found.model, found.steps, found.width, found.height, found.num_images]
    keep_estimated(page, time, estimate, counted, run, api_name="estimate")
