"""The denoisers of a pipeline, and their self-attention layers."""

import inspect
from collections.abc import Iterator
from typing import Any

from diffusers import ControlNetXSAdapter, DiffusionPipeline, ModularPipeline
from torch import nn

from diffattn.architectures import ARCHITECTURES, architecture_of, why_not_covered
from diffattn.methods.base import LayerSpec

Pipeline = DiffusionPipeline | ModularPipeline
"""A pipeline of diffusers, in one piece or made of blocks."""

CONTROL = ("controlnet", "adapter", "unconditional_transformer")
"""Attribute names of the networks that a pipeline calls in every step besides its denoiser."""

DENOISER = ("unet", "transformer", "transformer_2", "decoder", "prior")
"""Attribute names of the denoiser of a pipeline, of which the first that is there is the main one."""

EXPERTS = ("transformer_2",)
"""Attribute names of denoisers that take over from the main one at some noise level, as in Wan 2.2."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or the module itself."""
    inside = model._modules.get("_orig_mod")  # many times as fast as `getattr`, which fails for any other module
    return model if inside is None else inside


def is_compiled(model: nn.Module) -> bool:
    """Whether a module or any part of it was compiled."""
    if uncompiled(model) is not model:
        return True
    parts = [model]
    while parts:  # faster than `modules()`, which would also visit each only once
        part = parts.pop()
        if part._compiled_call_impl is not None:
            return True
        parts.extend(part.children())
    return False


def denoiser_of(pipe: Any) -> Any:
    """A pipeline's UNet, transformer, or decoder or prior of Stable Cascade, supported or not; None without one."""
    return next((part for name in DENOISER if (part := getattr(pipe, name, None)) is not None), None)


def denoisers_of(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Prefix of layer names -> denoiser; the main one comes first, without a prefix.

    Raises:
        TypeError: neither a pipeline with a supported denoiser nor a supported denoiser.
    """
    if isinstance(pipe_or_model, nn.Module):
        architecture_of(uncompiled(pipe_or_model))
        return {"": pipe_or_model}
    if not isinstance(pipe_or_model, Pipeline):
        raise TypeError(f"expected a diffusers pipeline or its denoiser, got {type(pipe_or_model).__name__}")
    main = denoiser_of(pipe_or_model)
    if not isinstance(main, nn.Module):
        raise TypeError(f"{type(pipe_or_model).__name__} has no denoiser (unet or transformer)")
    architecture_of(uncompiled(main))
    others = {f"{name}.": net for name, net in _other_networks(pipe_or_model) if _is_supported(net)}
    once = {id(uncompiled(net)): name for name, net in reversed({"": main, **others}.items())}  # the first name of each
    return {"": main} | {name: net for name, net in others.items() if once[id(uncompiled(net))] == name}


def argument_names(model: nn.Module) -> list[str]:
    """The names of the arguments of a denoiser's forward; of the class that it is derived from, where its own hands on
    whatever it is given."""
    names: list[str] = []
    for kind in type(model).__mro__:
        if "forward" not in vars(kind):
            continue
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        names = names or [parameter.name for parameter in parameters]
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return [parameter.name for parameter in parameters]
    return names


def draws(prefix: str) -> bool:
    """Whether the denoiser with this prefix of layer names draws, rather than steering the one that does."""
    return prefix.removesuffix(".") in ("", *EXPERTS)


def uncovered_networks(pipe_or_model: Any) -> list[str]:
    """One sentence for every other network of a pipeline that `denoisers_of` excludes, with the reason."""
    return [
        f"{name} ({type(uncompiled(net)).__name__}) runs unpatched: {_reason_uncovered(uncompiled(net))}"
        for name, net in _other_networks(pipe_or_model)
        if not _is_supported(net)
    ]


def self_attention_layers(model: nn.Module) -> list[tuple[LayerSpec, Any]]:
    """Every self-attention layer of a supported denoiser, with the module that has `set_processor`."""
    inner = uncompiled(model)
    return [(spec, module) for spec, module in architecture_of(inner).layers(inner) if not spec.is_cross_attention]


def _other_networks(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, network) of what takes over from the denoiser or steers it, including the members of multi-networks."""
    if not isinstance(pipe, Pipeline):
        return
    for name in EXPERTS:
        expert = getattr(pipe, name, None)
        if isinstance(expert, nn.Module) and expert is not denoiser_of(pipe):
            yield name, expert
    for name in CONTROL:
        network = getattr(pipe, name, None)
        if not isinstance(network, nn.Module) or isinstance(network, ControlNetXSAdapter):  # copied into the UNet
            continue
        parts = getattr(network, "nets", None) or getattr(network, "adapters", None)
        if parts is None:
            yield name, network
        else:
            yield from ((f"{name}.{i}" if len(parts) > 1 else name, part) for i, part in enumerate(parts))


def _is_supported(network: nn.Module) -> bool:
    return any(architecture.matches(uncompiled(network)) for architecture in ARCHITECTURES)


def _reason_uncovered(network: nn.Module) -> str:
    if reason := why_not_covered(network):
        return f"nothing to accelerate in it: {reason}"
    if any(hasattr(m, "set_processor") or isinstance(m, nn.MultiheadAttention) for m in network.modules()):
        return "its architecture is not supported"
    return "it has no attention layers"
