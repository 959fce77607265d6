"""The method used when none is named: the same in Python, on the command line and on the web page."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from diffattn.architectures.denoisers import Pipeline, denoisers_of, self_attention_layers
from diffattn.methods import method_for
from diffattn.methods.base import LayerSpec


def default_method(pipe_or_model: Pipeline | nn.Module) -> str:
    """The name in `diffattn.METHODS` that suits a pipeline or a denoiser, see `methods.method_for`.

    Raises:
        TypeError: the architecture is not supported.
    """
    return method_for(layers_of(denoisers_of(pipe_or_model)))


def layers_of(denoisers: Mapping[str, nn.Module]) -> list[LayerSpec]:
    """Every self-attention layer of a pipeline's denoisers (prefix -> denoiser), under its own name."""
    return [
        spec if not prefix else replace(spec, name=prefix + spec.name)
        for prefix, model in denoisers.items()
        for spec, _ in self_attention_layers(model)
    ]
