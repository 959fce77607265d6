"""The denoisers of a pipeline."""

from typing import Any

from diffusers import ControlNetModel, DiffusionPipeline
from torch import nn

from diffattn.architectures import architecture_of


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or the module itself."""
    return getattr(model, "_orig_mod", model)


def denoisers_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Prefix of layer names -> denoiser; the main one comes first, without a prefix.

    Raises:
        TypeError: neither a pipeline with a supported denoiser nor a supported denoiser.
    """
    if isinstance(pipe_or_model, nn.Module):
        architecture_of(uncompiled(pipe_or_model))
        return {"": pipe_or_model}
    if not isinstance(pipe_or_model, DiffusionPipeline):
        raise TypeError(f"expected a diffusers pipeline or its denoiser, got {type(pipe_or_model).__name__}")
    main = getattr(pipe_or_model, "unet", None) or getattr(pipe_or_model, "transformer", None)
    if not isinstance(main, nn.Module):
        raise TypeError(f"{type(pipe_or_model).__name__} has no denoiser (unet or transformer)")
    architecture_of(uncompiled(main))
    found = {"": main}
    control = getattr(pipe_or_model, "controlnet", None)
    nets = getattr(control, "nets", [control])  # MultiControlNetModel has several
    for i, net in enumerate(nets):
        if isinstance(net, nn.Module) and isinstance(uncompiled(net), ControlNetModel):
            found["controlnet." if len(nets) == 1 else f"controlnet.{i}."] = net
    return found
