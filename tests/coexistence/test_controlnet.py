"""ControlNets, which are patched with their pipeline."""

from typing import Any

import diffusers
import pytest
import torch
from support import tiny
from support.coexistence import FEW, Subject, agree, coexists, differ
from support.denoisers.case import random_weights

import diffattn

FROM: dict[str, dict[str, int]] = {
    "SD3": {"num_extra_conditioning_channels": 0},
    "Flux": {"num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
}
"""What a ControlNet made from a transformer is told of it."""


def controlled(subject: Subject) -> Subject:
    """The subject's pipeline with a ControlNet beside its denoiser."""
    parts, denoiser = dict(subject.target.components), subject.denoiser
    image = {"image": tiny.picture()}
    if "UNet" in type(denoiser).__name__:
        parts = {name: part for name, part in parts.items() if name != "image_encoder"}
        pipe: Any = diffusers.StableDiffusionControlNetPipeline(
            **parts, controlnet=tiny.controlnet(), requires_safety_checker=False
        )
    else:
        kind = type(denoiser).__name__.removesuffix("Transformer2DModel")
        network: Any = getattr(diffusers, f"{kind}ControlNetModel")
        control = random_weights(network.from_transformer(denoiser, num_layers=1, **FROM[kind]))
        name = type(subject.target).__name__.replace("Pipeline", "ControlNetPipeline")
        pipe = getattr(diffusers, name)(**parts, controlnet=control)
        image = {"control_image": tiny.picture()}
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, subject.arguments | image)


@pytest.mark.slow
@coexists(
    "ControlNet",
    "of the pipeline, patched with it",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the layers of both networks are accelerated, and the condition matters; at scale 0 the pictures are those "
    "without a ControlNet",
)
def test_controlnet(subject: Subject) -> None:
    latents = torch.randn(subject.draw().shape, generator=torch.Generator().manual_seed(4))
    own = subject.draw_patched(latents=latents)  # encoding the condition takes numbers from the generator
    pair = controlled(subject)
    pair.arguments["latents"] = latents
    exact = pair.draw()
    handle = diffattn.patch(pair.target, **FEW)
    accelerated = pair.draw()
    layers = [layer for layer in handle.report().layers if layer.left_alone is None]
    assert all(layer.accelerated for layer in layers)
    assert {layer.name.startswith("controlnet.") for layer in layers} == {True, False}
    differ(accelerated, exact)
    differ(accelerated, own)
    agree(pair.draw(controlnet_conditioning_scale=0.0), own)
    handle.remove()
    assert (pair.draw() == exact).all()
