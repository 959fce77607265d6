"""The method that a model takes when its user names none: the same in Python, on the command line and on the page."""

from collections.abc import Mapping
from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import nn

from diffattn.architectures import architecture_of
from diffattn.architectures.denoisers import denoisers_of, uncompiled
from diffattn.methods import method_for
from diffattn.methods.base import LayerSpec


def default_method(pipe_or_model: DiffusionPipeline | nn.Module) -> str:
    """The name in `diffattn.METHODS` that fits a pipeline or a denoiser, see `methods.method_for`.

    Raises:
        TypeError: the architecture is not supported.
    """
    return method_for(layers_of(denoisers_of(pipe_or_model)))


def layers_of(denoisers: Mapping[str, nn.Module]) -> list[LayerSpec]:
    """Every attention layer of the denoisers of a pipeline (prefix -> denoiser), under its own name."""
    return [
        spec if not prefix else replace(spec, name=prefix + spec.name)
        for prefix, model in denoisers.items()
        for spec, _ in architecture_of(uncompiled(model)).layers(uncompiled(model))
    ]
