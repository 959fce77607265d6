"""The Python code that draws a picture again."""

from diffattn.generation import EXACT, Request
from diffattn.loading import embedded_models


def snippet(request: Request, draws_classes: bool = False) -> str:
    """Code for the first picture of a request that went through `prepare`: imports, then one line per thing done.

    Args:
        request: what was drawn.
        draws_classes: the prompt is the name, or the id, of a class.
    """
    load = f"diffattn.load_demo({request.model!r})"
    imports = ["import torch", "import diffattn"]
    if request.model not in embedded_models():
        load = f"load_pipeline({request.model!r})"
        imports.append("from diffattn.loading import load_pipeline")
    lines = [*imports, f"pipe = {load}"]
    if request.method != EXACT:
        preset = f", preset={request.preset!r}" if request.preset else ""
        options = "".join(f", {name}={value!r}" for name, value in request.options.items())
        lines.append(f"diffattn.patch(pipe, {request.method!r}{preset}{options})")
    subject = repr(int(request.prompt) if draws_classes and request.prompt.isdecimal() else request.prompt)
    if request.negative_prompt:
        subject += f", negative_prompt={request.negative_prompt!r}"
    call = (
        f"pipe({subject}, num_inference_steps={request.steps}, guidance_scale={request.guidance}, "
        f"width={request.width}, height={request.height}, generator=torch.Generator().manual_seed({request.seed}))"
    )
    return "\n".join([*lines, f"image = {call}.images[0]"]) + "\n"
