"""The inputs of a measurement of speed and quality."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from diffattn.app.jobs import AUTOMATIC, Measurement, Worker, accelerations
from diffattn.app.jobs.choices import UNPATCHED
from diffattn.app.jobs.limits import AGAINST, MIN_SAMPLES
from diffattn.app.jobs.suited import compared_at_first, own_method, plain_name, suited_to_all
from diffattn.app.page.shared import OWN, PROMPTS, QUICK, TOLD, given_or_own, toast, whole_numbers

OWN_PROMPTS, SHARED, LISTED = "own", "shared", "list"
NUMBERS = "One row for each, used at every noise level. Mediators: perfect squares that the model was trained with."
SENT = (
    "models", "accelerations", "numbers", "samples", "steps", "guidance", "prompts", "extractor", "against", "seed",
)  # fmt: skip
"""Names of the inputs, in the order in which the endpoint takes them."""


@dataclass
class Asked:
    """Input components."""

    models: gr.Dropdown
    accelerations: gr.Dropdown
    numbers: gr.Textbox
    samples: gr.Slider
    steps: gr.Slider
    guidance: gr.Number
    prompts: gr.Textbox
    extractor: gr.Dropdown
    against: gr.Radio
    seed: gr.Number
    which: gr.Radio  # prompts; it is not sent
    follow: Any = field(default=None)  # handler, inputs and outputs that let the accelerations follow the models

    def all(self) -> list[Any]:
        """The components whose values are sent."""
        return [getattr(self, name) for name in SENT]

    def shared(self) -> list[Any]:
        """The components whose values follow the other tabs."""
        return [self.models, self.prompts, self.seed, self.which]


def asked(worker: Worker, ask: gr.Column, rest: gr.Column, has_prompts: bool) -> Asked:
    """Lay out the inputs: what is measured in the column `ask`, how in `rest`.

    Args:
        worker: for its models and limits.
        ask, rest: columns of the page.
        has_prompts: some model has prompts of its own.
    """
    names, limits = worker.models.names(), worker.limits
    with ask:
        models = gr.Dropdown(
            names, value=names[:1], label="Models", multiselect=True, allow_custom_value=worker.models.hub,
            max_choices=limits.measured_models,
        )  # fmt: skip
        ways = gr.Dropdown(  # all, for programs; the page narrows them down to those that work for the models
            [(plain_name(name), name) for name in accelerations() if name != UNPATCHED],
            value=compared_at_first(worker.models.place(names[0])) if names else [AUTOMATIC], multiselect=True,
            label="Accelerations", max_choices=limits.measured_variants,
            info="In addition to exact attention, which is always measured.",
        )  # fmt: skip
    with rest, gr.Accordion("Settings", open=True, elem_classes="diffattn-settings"):
        numbers = gr.Textbox(
            "", label="Numbers of agents or mediators", placeholder="16, 64", info=NUMBERS, max_length=200
        )
        with gr.Row():
            samples = whole_numbers(MIN_SAMPLES, limits.samples, 16, label="N: pictures of each", min_width=160)
            steps = whole_numbers(1, limits.steps, 20, label="Steps", min_width=160)
        which, prompts = _prompts(has_prompts)
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=120)
        guidance, extractor, against = _more(worker)
    found = Asked(models, ways, numbers, samples, steps, guidance, prompts, extractor, against, seed, which)
    _wire(worker, found)
    return found


def _prompts(has_prompts: bool) -> tuple[gr.Radio, gr.Textbox]:
    choices = [("the model's own", OWN_PROMPTS), ("the prompt of the other tabs", SHARED), ("a list", LISTED)]
    which = gr.Radio(
        choices, value=OWN_PROMPTS if has_prompts else LISTED, label="Prompts",
        info="The model's own: its classes, or the prompts of its stored run. FID of a single prompt says little.",
    )  # fmt: skip
    prompts = gr.Textbox(
        "" if has_prompts else "\n".join(PROMPTS), label="List of prompts", lines=3, visible=not has_prompts,
        info="One per line, used in turn. Empty: the model's own.",
    )  # fmt: skip
    return which, prompts


def _more(worker: Worker) -> tuple[gr.Number, gr.Dropdown, gr.Radio]:
    with gr.Accordion("More settings", open=False):
        extractor = gr.Dropdown(
            [AUTOMATIC, *worker.models.extractors()], value=AUTOMATIC, label="Features",
            info="The network that extracts features; automatic: the one made for the model's pictures.",
        )  # fmt: skip
        against = gr.Radio(
            [("real pictures where stored", AGAINST[0]), ("its own exact pictures", AGAINST[1])], value=AGAINST[0],
            label="Measured against", info="Exact pictures use other seeds: exact attention's own figure shows chance.",
        )  # fmt: skip
        guidance = gr.Number(None, label="Guidance", placeholder=OWN, info="1: none; 0: the model's own", min_width=120)
    return guidance, extractor, against


def _wire(worker: Worker, found: Asked) -> None:
    """Let the accelerations follow the models."""

    def follow(models: list[str], chosen: list[str]) -> Any:
        try:
            places = [worker.models.place(model) for model in models or ()]
        except ValueError as error:
            raise toast(error) from None
        own = {own_method(place) for place in places}
        allowed = [name for name in suited_to_all(places) if name != UNPATCHED]
        first = compared_at_first(places[0]) if len(places) == 1 else [AUTOMATIC]
        kept = [name for name in chosen or () if name in allowed] or [name for name in first if name in allowed]
        words = [(plain_name(name, next(iter(own)) if len(own) == 1 else None), name) for name in allowed]
        return gr.Dropdown(words, value=kept)

    found.follow = (follow, [found.models, found.accelerations], [found.accelerations])
    found.models.input(*found.follow, api_visibility="private", **TOLD)


def wire_prompts(found: Asked, prompt: gr.Textbox) -> None:
    """Fill in the prompts by their choice.

    Args:
        found: the inputs.
        prompt: the one that the other tabs share.
    """

    def fill(which: str, prompts: str, prompt: str) -> Any:
        text = {OWN_PROMPTS: "", SHARED: prompt}.get(which, prompts)
        return gr.Textbox(text, visible=which != OWN_PROMPTS, interactive=which == LISTED)

    given: list[Any] = [found.which, found.prompts, prompt]
    found.which.change(fill, given, found.prompts, api_visibility="private", **QUICK)


def measurement_of(worker: Worker, given: Sequence[Any]) -> Measurement:
    """The checked measurement for the values of `Asked.all()`."""
    values = dict(zip(SENT, given, strict=True))
    values["guidance"] = given_or_own(values["guidance"])
    found = worker.limits.measurement(values.pop("models"), **values)
    for model in found.models:
        worker.models.source(model)
    return found
