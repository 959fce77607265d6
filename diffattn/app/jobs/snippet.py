"""Python code that draws a picture again."""

from collections.abc import Sequence

import torch

from diffattn.drawing.loading import embedded_models
from diffattn.drawing.request import UNPATCHED, Request
from diffattn.machine import dtype_name
from diffattn.patching.recipe import is_tuned

FOR_PEOPLE = ("protocol", "promised", "verified")  # keys of a recipe without effect
MODELS_DIR = "MODELS_DIR"
"""Placeholder for the folder of models, whose path is not disclosed."""


def snippet(
    request: Request,
    *,
    dit_labels: Sequence[int] | None = None,
    local: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> str:
    """Code for the first picture of a request returned by `prepare`: imports, then one line per step.

    Args:
        request: what was drawn.
        dit_labels: the class ids for a `DiTPipeline`, which takes no names and no size.
        local: the model is in the folder of models; the code then contains a placeholder for that folder.
        dtype, device: used to draw it.
    """
    imports, load = _load(request.model, local, dtype)
    lines = ["import torch", "import diffattn", *imports, f"pipe = {load}"]
    if str(device) != "cpu":
        lines.append(f"pipe.to({str(device)!r})")
    if request.method != UNPATCHED:
        preset = f", preset={request.preset!r}" if request.preset else ""
        kept = {name: value for name, value in (request.recipe or {}).items() if name not in FOR_PEOPLE}
        recipe = f", recipe={kept!r}" if request.recipe is not None else ""
        given = {**request.options, **({"decisions": request.decisions} if request.decisions else {})}
        options = "".join(f", {name}={value!r}" for name, value in given.items())
        named = is_tuned(kept) or "method" in kept  # from the recipe
        method = "" if named else f", {request.method!r}"
        lines.append(f"diffattn.patch(pipe{method}{preset}{recipe}{options})")
    subject = repr(request.prompt)  # of a class too: a name, or an id in digits
    if request.negative_prompt is not None:
        subject += f", negative_prompt={request.negative_prompt!r}"
    size = f"width={request.width}, height={request.height}, "
    if dit_labels is not None:
        subject, size = repr(list(dit_labels)), ""
    guidance = "" if request.guidance is None else f"guidance_scale={request.guidance}, "
    call = (
        f"pipe({subject}, num_inference_steps={request.steps}, {guidance}"
        f"{size}generator=torch.Generator().manual_seed({request.seed}))"
    )
    return "\n".join([*lines, f"image = {call}.images[0]"]) + "\n"


def _load(model: str, local: bool, dtype: torch.dtype) -> tuple[list[str], str]:
    """The imports that loading the model needs, and the expression that loads it."""
    precision = "" if dtype == torch.float32 else f", torch.{dtype_name(dtype)}"
    if model in embedded_models():
        return [], f"diffattn.load_demo({model!r}{precision})"
    place = f"{MODELS_DIR}/{model}" if local else model
    note = f"  # {MODELS_DIR}: the folder of models, as given to --models-dir" if local else ""
    return ["from diffattn.drawing.loading import load_pipeline"], f"load_pipeline({place!r}{precision}){note}"
