"""Processors that others put there, before and after patching."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from support import tiny
from support.patching import ALWAYS, FEW, MID, Make, call, self_attention
from torch import Tensor

import diffattn
from diffattn import DiffAttnWarning


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


@pytest.fixture(autouse=True)
def _no_thresholds_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(tmp_path / "none.json"))


# Processors that others put there.


def test_slicing_before_patching_stays_where_exact(pipe: DiffusionPipeline) -> None:
    pipe.enable_attention_slicing(1)
    sliced = tiny.run(pipe)
    processors = pipe.unet.attn_processors
    handle = diffattn.patch(pipe, **FEW, schedule={0.5: {}, 0.0: "exact"})
    accelerated = tiny.run(pipe)
    assert handle.report().calls_passed_through > 0
    assert not torch.allclose(accelerated, sliced, atol=1e-4)
    handle.remove()
    assert pipe.unet.attn_processors == processors
    assert all(type(p) is SlicedAttnProcessor for p in processors.values())
    assert torch.equal(tiny.run(pipe), sliced)


def slice_attention(pipe: DiffusionPipeline) -> None:
    pipe.enable_attention_slicing(1)


def fuse(pipe: DiffusionPipeline) -> None:
    pipe.fuse_qkv_projections(vae=False)


def set_others(pipe: DiffusionPipeline) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


DISPLACED = {"SlicedAttnProcessor": slice_attention, "FusedAttnProcessor2_0": fuse, "AttnProcessor": set_others}


@pytest.mark.parametrize("name", DISPLACED)
def test_displaced_processors_are_noticed_reported_and_left_in_place(pipe: DiffusionPipeline, name: str) -> None:
    handle = diffattn.patch(pipe, **FEW)
    tiny.run(pipe)
    accelerated = handle.report().calls_accelerated
    DISPLACED[name](pipe)
    with pytest.warns(DiffAttnWarning, match=f"7 patched layers run without diffattn.*replaced by {name}"):
        displaced = tiny.run(pipe)
    tiny.run(pipe)  # said once: here the warning would be an error
    report = handle.report()
    assert report.calls_accelerated == accelerated
    assert report.layers_patched == 0
    assert {layer.displaced_by for layer in report.layers if layer.left_alone is None} == {name}
    assert f"displaced by {name}" in str(report)
    theirs = pipe.unet.attn_processors
    handle.remove()
    assert pipe.unet.attn_processors == theirs
    assert torch.equal(tiny.run(pipe), displaced)
    assert not pipe.unet._forward_pre_hooks


def test_one_displaced_layer_leaves_the_others_accelerated(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **ALWAYS)
    theirs = AttnProcessor2_0()
    self_attention(pipe.unet)[MID].set_processor(theirs)
    with pytest.warns(DiffAttnWarning, match="1 patched layer runs without"):
        call(pipe.unet)
    assert handle.report().layers_accelerated == handle.report().layers_patched == 6
    handle.remove()
    assert self_attention(pipe.unet)[MID].processor is theirs
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


def test_displacement_is_noticed_in_the_next_run_of_one_step(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **ALWAYS)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    tiny.run(pipe, num_inference_steps=1)
    tiny.run(pipe, num_inference_steps=1)
    assert handle.report().runs == 2
    pipe.enable_attention_slicing(1)
    with pytest.warns(DiffAttnWarning, match="replaced by SlicedAttnProcessor"):
        tiny.run(pipe, num_inference_steps=1)


def test_our_processors_that_come_back_accelerate_again(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    accelerated = tiny.run(pipe)
    fuse(pipe)
    with pytest.warns(DiffAttnWarning):
        tiny.run(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)
    assert handle.report().layers_patched == 7
    assert "displaced" not in str(handle.report())
    handle.remove()
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


def test_our_processors_that_come_back_after_removal_are_the_original(pipe: DiffusionPipeline) -> None:
    original = tiny.run(pipe)
    handle = diffattn.patch(pipe, **FEW)
    accelerated = tiny.run(pipe)
    fuse(pipe)
    handle.remove()
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(tiny.run(pipe), original)
    again = diffattn.patch(pipe, **FEW)  # nothing of the old patch is in the way
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)
    again.remove()
    assert torch.equal(tiny.run(pipe), original)


def test_fused_projections_before_patching_are_used(pipe: DiffusionPipeline) -> None:
    with diffattn.patch(pipe, **FEW):
        accelerated = tiny.run(pipe)
    fuse(pipe)
    fused = tiny.run(pipe)
    handle = diffattn.patch(pipe, **FEW)
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)
    assert handle.report().layers_accelerated == 7
    handle.remove()
    assert all(type(p) is FusedAttnProcessor2_0 for p in pipe.unet.attn_processors.values())
    assert torch.equal(tiny.run(pipe), fused)


def test_weights_that_change_after_unfusing_are_used(pipe: DiffusionPipeline) -> None:
    diffattn.patch(pipe, **FEW)
    fuse(pipe)
    pipe.unfuse_qkv_projections(vae=False)  # diffusers leaves the fused copies of the weights behind
    with torch.no_grad():
        for layer in self_attention(pipe.unet).values():
            layer.to_q.weight.mul_(3)
    after = tiny.run(pipe)
    diffattn.unpatch(pipe)
    fresh = copy.deepcopy(pipe)
    for layer in self_attention(fresh.unet).values():
        layer.fused_projections = False
    diffattn.patch(fresh, **FEW)
    torch.testing.assert_close(after, tiny.run(fresh), atol=1e-4, rtol=1e-3)


class Doubling(AttnProcessor2_0):
    """A user's own processor."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


def test_custom_processors_are_left_alone_and_reported(pipe: DiffusionPipeline) -> None:
    custom = Doubling()
    self_attention(pipe.unet)[MID].set_processor(custom)
    handle = diffattn.patch(pipe, **FEW)
    assert self_attention(pipe.unet)[MID].processor is custom
    tiny.run(pipe)
    layer = next(x for x in handle.report().layers if x.name == MID)
    assert layer.left_alone == "custom processor Doubling"
    assert "1 layers left alone: custom processor Doubling" in str(handle.report())
    handle.remove()
    assert self_attention(pipe.unet)[MID].processor is custom


def test_cross_attention_is_left_alone_and_reported(pipe: DiffusionPipeline) -> None:
    before = {name: p for name, p in pipe.unet.attn_processors.items() if "attn2" in name}
    report = diffattn.patch(pipe, **FEW).report()
    assert {name: p for name, p in pipe.unet.attn_processors.items() if "attn2" in name} == before
    assert sum(x.left_alone == "cross-attention" for x in report.layers) == 7
    assert "7 layers left alone: cross-attention" in str(report)


def test_only_custom_processors_is_nothing_to_patch(pipe: DiffusionPipeline) -> None:
    pipe.unet.set_attn_processor(Doubling())
    with pytest.raises(ValueError, match=r"nothing to patch in UNet2DConditionModel.*7 x custom processor Doubling"):
        diffattn.patch(pipe)
    assert not pipe.unet._forward_pre_hooks


# IP-Adapter.


IMAGE_DIM = 24


def load_adapter(pipe: DiffusionPipeline) -> None:
    """An IP-Adapter with random weights, in the layout that `load_ip_adapter` reads."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = {"proj.weight": rand(4 * tiny.WIDTH, IMAGE_DIM), "proj.bias": rand(4 * tiny.WIDTH)}
    image |= {"norm.weight": torch.ones(tiny.WIDTH), "norm.bias": torch.zeros(tiny.WIDTH)}
    modules = dict(pipe.unet.named_modules())
    layers = [modules[name.removesuffix(".processor")] for name in pipe.unet.attn_processors if "attn2" in name]
    keys = {
        f"{2 * i + 1}.to_{kind}_ip.weight": rand(layer.inner_dim, tiny.WIDTH)
        for i, layer in enumerate(layers)
        for kind in "kv"
    }
    weights = {"image_proj": image, "ip_adapter": keys}
    pipe.load_ip_adapter(
        weights, subfolder="", weight_name="ip.bin", image_encoder_folder=None, low_cpu_mem_usage=False
    )


def run_with_image(pipe: DiffusionPipeline, **overrides: Any) -> Tensor:
    embeds = torch.randn(2, 1, IMAGE_DIM, generator=torch.Generator().manual_seed(1))
    return tiny.run(pipe, ip_adapter_image_embeds=[embeds], **overrides)


def test_an_ip_adapter_loaded_before_patching_keeps_working(pipe: DiffusionPipeline) -> None:
    load_adapter(pipe)
    exact = run_with_image(pipe)
    adapters = {name: p for name, p in pipe.unet.attn_processors.items() if "attn2" in name}
    assert all(type(p) is IPAdapterAttnProcessor2_0 for p in adapters.values())
    handle = diffattn.patch(pipe, **FEW)
    accelerated = run_with_image(pipe)
    assert handle.report().layers_accelerated == 7
    assert not torch.allclose(accelerated, exact, atol=1e-4)
    pipe.set_ip_adapter_scale(0.0)
    assert not torch.allclose(run_with_image(pipe), accelerated, atol=1e-5)  # the image counts
    pipe.set_ip_adapter_scale(1.0)
    handle.remove()
    assert {name: p for name, p in pipe.unet.attn_processors.items() if "attn2" in name} == adapters
    assert torch.equal(run_with_image(pipe), exact)


def test_an_ip_adapter_loaded_on_a_patched_pipeline_displaces_and_works(pipe: DiffusionPipeline) -> None:
    unpatched = copy.deepcopy(pipe)
    load_adapter(unpatched)
    exact = run_with_image(unpatched)
    handle = diffattn.patch(pipe, **FEW)
    load_adapter(pipe)
    with pytest.warns(DiffAttnWarning, match=r"7 patched layers run without diffattn.*patch again"):
        run_with_image(pipe)
    handle.remove()
    assert torch.equal(run_with_image(pipe), exact)
    handle = diffattn.patch(pipe, **FEW)
    run_with_image(pipe)
    assert handle.report().layers_accelerated == 7


def test_an_ip_adapter_unloaded_from_a_patched_pipeline(pipe: DiffusionPipeline) -> None:
    original = tiny.run(pipe)
    load_adapter(pipe)
    handle = diffattn.patch(pipe, **FEW)
    pipe.unload_ip_adapter()
    with pytest.warns(DiffAttnWarning, match="7 patched layers run without diffattn"):
        assert torch.equal(tiny.run(pipe), original)
    handle.remove()
    assert torch.equal(tiny.run(pipe), original)
