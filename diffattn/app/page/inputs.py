"""The inputs of a request, shared by Generate and Compare."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, Worker, accelerations
from diffattn.app.jobs.choices import UNPATCHED
from diffattn.app.jobs.restore import SETTINGS
from diffattn.app.jobs.suited import compared_at_first, own_method, plain_name, suited_accelerations
from diffattn.app.page.asked import Asked
from diffattn.app.page.shared import OWN, PROMPTS, QUICK, TOLD, given_or_own, line, toast, whole_numbers
from diffattn.app.page.sizes import OWN_SIZE, SIZE_OF, own_sizes, size_value, sizes

SWITCH = "diffattnSwitch"
"""Name of the page's script that carries values from one tab to another."""

RANDOM = "Math.floor(Math.random() * 2 ** 31)"
SHOWN_CLASSES = 20  # as examples


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
    keep_seed: gr.Checkbox | None  # the rest is not sent
    examples: gr.Dataset
    size: gr.Radio
    about: gr.HTML
    filled: list[Any] = field(default_factory=list)  # events other than typing that fill in the shared values
    follow: Any = None  # handler, inputs and outputs that let everything else follow the model

    def all(self) -> list[Any]:
        """The components whose values are sent."""
        return [getattr(self, name) for name in SETTINGS]

    def shared(self) -> list[Any]:
        """The components whose values all tabs share."""
        return [self.prompt, self.model, self.seed]

    def renew_seed(self, run: Any) -> None:
        """After the event `run`, choose a new seed for the next run unless the seed is kept."""
        js = f"(keep, seed) => keep ? seed : {RANDOM}"
        run.then(None, [self.keep_seed, self.seed], self.seed, js=js, api_visibility="private")


def inputs(worker: Worker, ask: gr.Column, rest: gr.Column, several: bool) -> Inputs:
    """Lay out the inputs: the prompt in the column `ask`, all others in `rest`.

    Args:
        worker: for its models and limits.
        ask, rest: columns of the page.
        several: more than one acceleration may be chosen.
    """
    names, limits = worker.models.names(), worker.limits
    first = names[0] if names else ""
    with ask:
        prompt = gr.Textbox(
            PROMPTS[0], label="Prompt", max_length=limits.prompt, lines=2, max_lines=4, placeholder=PROMPTS[1],
            submit_btn=False,
        )  # fmt: skip
        examples = gr.Dataset(
            label="Examples", components=[prompt], samples=_examples(worker, first), show_label=False, type="values",
            elem_classes="diffattn-examples",
        )  # fmt: skip
    with rest, gr.Accordion("Settings", open=True, elem_classes="diffattn-settings"):
        model = gr.Dropdown(
            names, value=first or None, label="Model", allow_custom_value=worker.models.hub,
            info="Or type a name from the hub: owner/name." if worker.models.hub else None,
        )  # fmt: skip
        about = gr.HTML(describe_model(worker, first) if first else line("No model."))
        acceleration = _acceleration(worker, first, several)
        size = gr.Radio(sizes(worker, first), value=OWN_SIZE, label="Size")
        steps = whole_numbers(1, limits.steps, 20, label="Steps")
        count = 3 if several else 1
        num_images = whole_numbers(1, limits.images, count, label="Pictures", info="Each has the next seed.")
        seed, keep = _seed(several)
        width, height, guidance, negative, recipe = _more(worker, several)
    found = Inputs(
        prompt, model, acceleration, steps, guidance, width, height, seed, num_images, negative, recipe, keep, examples,
        size, about,
    )  # fmt: skip
    _wire(worker, found, several)
    return found


def _acceleration(worker: Worker, model: str, several: bool) -> gr.Dropdown:
    """All accelerations, for programs; the page narrows them down to those that work for the model."""
    choices = [(plain_name(name), name) for name in accelerations()]
    if not several:
        return gr.Dropdown(choices, value=AUTOMATIC, label="Acceleration", info="Automatic: what suits the model.")
    return gr.Dropdown(
        choices, value=_defaults(worker, model), label="Accelerations to compare", multiselect=True,
        max_choices=worker.limits.variants, info=f"Up to {worker.limits.variants}, each against exact attention.",
    )  # fmt: skip


def _seed(several: bool) -> tuple[gr.Number, gr.Checkbox | None]:
    keep: gr.Checkbox | None = None
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        if not several:
            keep = gr.Checkbox(True, label="Keep the seed", info="Off: a new one after every run", min_width=120)
            dice = gr.Button("New seed", size="sm", min_width=80)
            dice.click(None, None, seed, js=f"() => {RANDOM}", api_visibility="private")
    return seed, keep


def _more(worker: Worker, several: bool) -> tuple[gr.Number, gr.Number, gr.Number, gr.Textbox, gr.File]:
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            width = gr.Number(
                None, label="Width", placeholder=OWN, info="Pixels; 0: the model's own", precision=0, min_width=100
            )
            height = gr.Number(
                None, label="Height", placeholder=OWN, info="Pixels; 0: the model's own", precision=0, min_width=100
            )
            guidance = gr.Number(
                None, label="Guidance", placeholder=OWN, info="1: none; 0: the model's own", min_width=100
            )
        negative = gr.Textbox(
            "", label="Negative prompt", info="What to keep out of the picture.", max_length=worker.limits.prompt
        )
        use = "compared too" if several else "instead of the acceleration"
        recipe = gr.File(
            label=f"Recipe (JSON, see diffattn.patch), {use}", file_types=[".json"], file_count="single",
            type="filepath", height=120,
        )  # fmt: skip
    return width, height, guidance, negative, recipe


def _wire(worker: Worker, found: Inputs, several: bool) -> None:
    """Let examples, size presets and accelerations follow the model, and the size follow its presets."""
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    pick = found.examples.click(lambda row: row[0], found.examples, found.prompt, api_visibility="private", **QUICK)
    found.filled.append(pick)
    found.size.input(None, found.size, [found.width, found.height], js=SIZE_OF, **hidden)
    for number in (found.width, found.height):
        number.input(None, None, found.size, js="() => null", **hidden)

    def follow(model: str, chosen: Any, width: float | None, height: float | None) -> tuple[Any, ...]:
        try:
            size = size_value(worker, model, given_or_own(width), given_or_own(height))
            return describe_model(worker, model), *following(worker, model, chosen, size, several)
        except ValueError as error:
            raise toast(error) from None

    def follow_anew(model: str, chosen: Any) -> tuple[Any, ...]:
        return *follow(model, chosen, None, None), None, None

    dependent = [found.about, found.examples, found.size, found.acceleration]
    found.model.input(
        follow_anew, [found.model, found.acceleration], [*dependent, found.width, found.height],
        api_visibility="private", **TOLD,
    )  # fmt: skip
    found.follow = (follow, [found.model, found.acceleration, found.width, found.height], dependent)


def following(worker: Worker, model: str, chosen: Any, size: str | None, several: bool) -> tuple[Any, ...]:
    """Examples, size presets and accelerations for a model; accelerations that were chosen stay if they work."""
    place = worker.models.place(model)
    names, own = suited_accelerations(place), own_method(place)
    allowed = [name for name in names if name != UNPATCHED] if several else names
    kept: Any = [name for name in chosen or () if name in allowed] if several else chosen
    if several:
        kept = kept or _defaults(worker, model)
    elif kept not in allowed:
        kept = allowed[0]  # "automatic", or exact attention if nothing works
    offered, choices = sizes(worker, model), [(plain_name(name, own), name) for name in allowed]
    return (
        gr.Dataset(samples=_examples(worker, model)),
        gr.Radio(offered, value=size),
        gr.Dropdown(choices, value=kept),
    )


def share(tabs: Mapping[str, Any], drawing: Inputs, comparing: Inputs, measuring: Asked) -> None:
    """Let the tabs share one prompt, one model and one seed: those of the tab that is being left.

    Args:
        tabs: id -> every tab of the page, with the ids "generate", "compare" and "quality" of those that share.
        drawing, comparing: the inputs of the first two.
        measuring: those of the third, which has several models and prompts.
    """
    every = [*drawing.shared(), *comparing.shared(), *measuring.shared()]
    for name, tab in tabs.items():
        js = f"(...v) => {SWITCH}({name!r}, v)"
        moved = tab.select(None, every, every, js=js, api_visibility="private", show_progress="hidden")
        for found in (drawing, comparing, measuring):
            moved.then(*found.follow, api_visibility="private", **QUICK)
    for found in (drawing, comparing):
        for event in found.filled:
            event.then(*found.follow, api_visibility="private", **QUICK)


def _defaults(worker: Worker, model: str) -> list[str]:
    """The accelerations preselected in a comparison: those of the model's own method."""
    return compared_at_first(worker.models.place(model) if model else None)


def _examples(worker: Worker, model: str) -> list[list[str]]:
    classes = worker.models.describe(model).classes if model else ()
    return [[name.split(",")[0].strip()] for name in classes[:SHOWN_CLASSES]] or [[prompt] for prompt in PROMPTS]


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
    """One line about a model, its classes included, as HTML; raises `ValueError` like `Models.source`."""
    found = worker.models.describe(name)
    size = f", {own_sizes(found.size)} pixels" if found.size else ""
    guidance = f", guidance {found.guidance:g}" if found.guidance else ""
    shown = ", ".join(found.classes[:SHOWN_CLASSES]) + (" …" if len(found.classes) > SHOWN_CLASSES else "")
    classes = f". Prompt: the name of a class ({shown})" if found.classes else ""
    return line(f"{name}: {found.what}{size}{guidance}{classes}")


def model_as_data(worker: Worker, name: str) -> dict[str, Any]:
    """What `describe_model` says, as JSON types and with all classes; raises like it."""
    found = worker.models.describe(name)
    width, height = found.size or (None, None)
    return {
        "name": name, "what": found.what, "width": width, "height": height, "guidance": found.guidance,
        "classes": list(found.classes),
    }  # fmt: skip


def wire_about(worker: Worker, found: Inputs) -> None:
    """The endpoint that describes a model."""
    data = gr.JSON(label="Model", visible=False)

    def tell_model(model: str) -> tuple[str, dict[str, Any]]:
        """What is known about a model without loading it, as a line (HTML) and as data: its name, what it is, the width
        and height that it was trained for in pixels, the guidance that it recommends (null: not known), its classes."""
        try:
            return describe_model(worker, model), model_as_data(worker, model)
        except ValueError as error:
            raise toast(error) from None

    gr.Button(visible=False).click(tell_model, found.model, [found.about, data], api_name="describe_model", **QUICK)
