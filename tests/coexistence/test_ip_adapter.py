"""IP-Adapters, which attend to a picture beside the text or the layer's own tokens."""

from typing import Any

import pytest
import torch
from support import tiny
from support.coexistence import Subject, agree, assert_all_accelerated, check, coexists, differ
from torch import Tensor

IMAGE_DIM = 24


def load(subject: Subject) -> dict[str, Any]:
    """Loads an adapter with random weights; → the arguments that bring the picture."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weights(prefix: str, inner: int, wide: int, bias: bool) -> dict[str, Tensor]:
        found = {f"{prefix}.to_{kind}_ip.weight": rand(inner, wide) / 4 for kind in "kv"}
        return found | ({f"{prefix}.to_{kind}_ip.bias": rand(inner) for kind in "kv"} if bias else {})

    image = {"proj.weight": rand(4 * tiny.WIDTH, IMAGE_DIM), "proj.bias": rand(4 * tiny.WIDTH)}
    image |= {"norm.weight": torch.ones(tiny.WIDTH), "norm.bias": torch.zeros(tiny.WIDTH)}
    denoiser, keys = subject.denoiser, dict[str, Tensor]()
    if "Flux" in type(denoiser).__name__:
        for i in range(len(denoiser.transformer_blocks)):
            keys |= weights(str(i), denoiser.inner_dim, tiny.WIDTH, bias=True)
    else:
        modules = dict(denoiser.named_modules())
        layers = [modules[name.removesuffix(".processor")] for name in denoiser.attn_processors if "attn2" in name]
        for i, layer in enumerate(layers):
            keys |= weights(str(2 * i + 1), layer.inner_dim, tiny.WIDTH, bias=False)
    place = {} if "Flux" in type(denoiser).__name__ else {"subfolder": "", "low_cpu_mem_usage": False}
    subject.target.load_ip_adapter(
        {"image_proj": image, "ip_adapter": keys}, weight_name="ip.bin",
        **{"image_encoder_folder": None} if place else {"image_encoder_pretrained_model_name_or_path": None}, **place,
    )  # fmt: skip
    if place:
        return {"ip_adapter_image_embeds": [torch.cat((torch.zeros(1, 1, IMAGE_DIM), rand(1, 1, IMAGE_DIM)))]}
    nothing = [torch.zeros(1, 1, IMAGE_DIM)]
    return {"ip_adapter_image_embeds": [rand(1, 1, IMAGE_DIM)], "negative_ip_adapter_image_embeds": nothing}


@pytest.mark.slow
@coexists(
    "IP-Adapter",
    "loaded before the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="both take effect: the layers' own attention is accelerated, that over the picture stays exact",
)
def test_loaded_before(subject: Subject) -> None:
    arguments = load(subject)
    _, accelerated = check(subject, **arguments)
    with subject.patch():
        subject.target.set_ip_adapter_scale(0.0)
        differ(subject.draw(**arguments), accelerated)


@pytest.mark.slow
@coexists(
    "IP-Adapter",
    "loaded after the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the same pictures as loaded before; removed, the adapter stays",
)
def test_loaded_after(subject: Subject) -> None:
    handle = subject.patch()
    subject.draw()
    arguments = load(subject)
    accelerated = subject.draw(**arguments)
    assert_all_accelerated(handle, subject)
    handle.remove()
    agree(check(subject, **arguments).accelerated, accelerated)


@pytest.mark.slow
@coexists(
    "IP-Adapter",
    "unloaded from a patched pipeline",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the patch's own pictures; removed, the unpatched one",
)
def test_unloaded(subject: Subject) -> None:
    exact, own = subject.draw(), subject.draw_patched()
    arguments = load(subject)
    handle = subject.patch()
    subject.draw(**arguments)
    subject.target.unload_ip_adapter()
    agree(subject.draw(), own)
    assert_all_accelerated(handle, subject)
    handle.remove()
    assert torch.equal(subject.draw(), exact)
