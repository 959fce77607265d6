"""LoRA: weights beside the projections, which stay diffusers' own."""

import pytest
import torch
from support.coexistence import Subject, agree, assert_all_accelerated, check, coexists, differ
from torch import Tensor, nn

ADAPTER = "one"


def load(subject: Subject) -> None:
    """A LoRA with random weights on all queries, keys and values."""
    name = "unet" if "UNet" in type(subject.denoiser).__name__ else "transformer"
    generator, weights = torch.Generator().manual_seed(3), dict[str, Tensor]()
    for path, module in subject.denoiser.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(("to_q", "to_k", "to_v")):
            down = torch.randn(4, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, 4, generator=generator) / 2
            weights |= {f"{name}.{path}.lora_A.weight": down, f"{name}.{path}.lora_B.weight": up}
    subject.target.load_lora_weights(weights, adapter_name=ADAPTER)


@pytest.mark.slow
@coexists(
    "LoRA",
    "loaded before the patch",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="both take effect; at scale 0 the patch draws what it draws without a LoRA",
)
def test_loaded_before(subject: Subject) -> None:
    without = subject.draw_patched()
    load(subject)
    _, accelerated = check(subject)
    differ(accelerated, without)
    with subject.patch():
        subject.target.set_adapters([ADAPTER], adapter_weights=[0.0])
        agree(subject.draw(), without)


@pytest.mark.slow
@coexists(
    "LoRA",
    "loaded after the patch, and unloaded",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the same pictures as loaded before; unloaded, the patch's own; removed, the unpatched one",
)
def test_loaded_after(subject: Subject) -> None:
    exact, without = subject.draw(), subject.draw_patched()
    load(subject)
    expected = subject.draw_patched()
    subject.target.unload_lora_weights()
    handle = subject.patch()
    subject.draw()
    load(subject)
    assert torch.equal(subject.draw(), expected)
    assert_all_accelerated(handle, subject)
    subject.target.unload_lora_weights()
    assert torch.equal(subject.draw(), without)
    handle.remove()
    assert torch.equal(subject.draw(), exact)


@pytest.mark.slow
@coexists(
    "LoRA",
    "fused before the patch",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the same pictures as not fused",
)
def test_fused_before(subject: Subject) -> None:
    load(subject)
    loaded = subject.draw_patched()
    subject.target.fuse_lora()
    agree(check(subject).accelerated, loaded)


@pytest.mark.slow
@coexists(
    "LoRA",
    "fused and unfused while patched",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the same pictures as not fused; unloaded, the patch's own",
)
def test_fused_after(subject: Subject) -> None:
    without = subject.draw_patched()
    handle = subject.patch()
    load(subject)
    loaded = subject.draw()
    subject.target.fuse_lora()
    agree(subject.draw(), loaded)
    subject.target.unfuse_lora()
    agree(subject.draw(), loaded)
    subject.target.unload_lora_weights()
    agree(subject.draw(), without)
    assert_all_accelerated(handle, subject)
