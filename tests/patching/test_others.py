"""Processors that others install, before and after patching."""

import copy
import gc
import io
import pickle
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from support import tiny
from support.patching import ALWAYS, FEW, MID, Make, call, self_attention
from torch import Tensor

import diffattn
from diffattn import DiffAttnWarning
from diffattn.architectures.plug import plug_of
from diffattn.patching.patch import find_patch


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


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


def set_each(pipe: DiffusionPipeline) -> None:
    pipe.unet.set_attn_processor({name: AttnProcessor2_0() for name in pipe.unet.attn_processors})


def set_default(pipe: DiffusionPipeline) -> None:
    pipe.unet.set_default_attn_processor()


def set_xformers(pipe: DiffusionPipeline) -> None:
    """What `enable_xformers_memory_efficient_attention` installs; without xformers only the accelerated layers run."""
    for layer in self_attention(pipe.unet).values():
        layer.set_processor(XFormersAttnProcessor())


DISPLACING = {
    "enable_attention_slicing": (slice_attention, SlicedAttnProcessor),
    "fuse_qkv_projections": (fuse, FusedAttnProcessor2_0),
    "set_attn_processor": (set_others, AttnProcessor),
    "set_attn_processor(dict)": (set_each, AttnProcessor2_0),
    "set_default_attn_processor": (set_default, AttnProcessor),
    "xformers": (set_xformers, XFormersAttnProcessor),
}


def types_of(pipe: DiffusionPipeline) -> set[type]:
    return {type(layer.processor) for layer in self_attention(pipe.unet).values()}


@pytest.mark.parametrize("displace", DISPLACING)
def test_what_displaces_our_processors_is_plugged_in_the_next_run(pipe: DiffusionPipeline, displace: str) -> None:
    change, kind = DISPLACING[displace]
    handle = diffattn.patch(pipe, **FEW)
    accelerated = tiny.run(pipe)
    change(pipe)
    theirs = {name: layer.processor for name, layer in self_attention(pipe.unet).items()}
    assert types_of(pipe) == {kind}
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)  # without a warning
    report = handle.report()
    assert report.layers_patched == 7
    assert report.calls_accelerated == 2 * 4 * 7
    assert report.calls_passed_through == 0
    assert types_of(pipe) == {layer.processor.__class__ for layer in self_attention(pipe.unet).values()} == {kind}
    assert all(plug_of(layer.processor) is not None for layer in self_attention(pipe.unet).values())
    handle.remove()
    assert {name: layer.processor for name, layer in self_attention(pipe.unet).items()} == theirs
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("displace", [name for name in DISPLACING if name != "xformers"])
def test_where_it_runs_exact_it_is_what_it_was(pipe: DiffusionPipeline, displace: str) -> None:
    unpatched = copy.deepcopy(pipe)
    with diffattn.patch(pipe, **FEW, schedule={0.9999: {}, 0.0: "exact"}) as handle:
        handle.quiet()
        for each in (pipe, unpatched):
            DISPLACING[displace][0](each)
        assert torch.equal(tiny.run(pipe), tiny.run(unpatched))
        assert handle.report().calls_passed_through == 4 * 7
    assert torch.equal(tiny.run(pipe), tiny.run(unpatched))


@pytest.mark.parametrize("displace", DISPLACING)
def test_what_displaces_before_patching_is_plugged_as_well(pipe: DiffusionPipeline, displace: str) -> None:
    with diffattn.patch(pipe, **FEW):
        accelerated = tiny.run(pipe)
    DISPLACING[displace][0](pipe)
    handle = diffattn.patch(pipe, **FEW)
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)
    assert handle.report().calls_accelerated == 4 * 7


def test_a_processor_that_cannot_be_plugged_is_noticed_reported_and_left_in_place(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    tiny.run(pipe)
    accelerated = handle.report().calls_accelerated
    pipe.unet.set_attn_processor(Doubling())
    with pytest.warns(DiffAttnWarning, match="7 patched layers run without diffattn.*replaced by Doubling"):
        displaced = tiny.run(pipe)
    tiny.run(pipe)  # said once: here the warning would be an error
    report = handle.report()
    assert report.calls_accelerated == accelerated
    assert report.layers_patched == 0
    assert {layer.displaced_by for layer in report.layers if layer.left_alone is None} == {"Doubling"}
    assert "displaced by Doubling" in str(report)
    set_others(pipe)  # one that can be plugged takes its place
    tiny.run(pipe)
    assert handle.report().layers_patched == 7
    assert handle.report().calls_accelerated == 2 * accelerated
    pipe.unet.set_attn_processor(theirs := Doubling())
    handle.remove()
    assert set(pipe.unet.attn_processors.values()) == {theirs}
    assert torch.equal(tiny.run(pipe), displaced)
    assert not pipe.unet._forward_pre_hooks


def test_one_displaced_layer_is_plugged_and_the_others_stay(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **ALWAYS)
    before = pipe.unet.attn_processors
    theirs = AttnProcessor2_0()
    self_attention(pipe.unet)[MID].set_processor(theirs)
    call(pipe.unet)
    assert handle.report().layers_accelerated == handle.report().layers_patched == 7
    after = pipe.unet.attn_processors
    assert [name for name in after if after[name] is not before[name]] == [f"{MID}.processor"]
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
    tiny.run(pipe, num_inference_steps=1)
    assert handle.report().calls_accelerated == 3 * 7


def test_a_run_displaced_in_its_middle_ends_exact_and_the_next_is_accelerated(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)

    def at_step(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            set_others(pipe)
        return kwargs

    tiny.run(pipe, callback_on_step_end=at_step)
    for layer in (x for x in handle.report().layers if x.left_alone is None):
        assert layer.passed_through == {"replaced by AttnProcessor during the call": 2}
        assert layer.accelerated == 2
    tiny.run(pipe)
    assert handle.report().calls_accelerated == 6 * 7


def test_our_processors_that_come_back_accelerate_again(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    accelerated = tiny.run(pipe)
    fuse(pipe)
    tiny.run(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    torch.testing.assert_close(tiny.run(pipe), accelerated, atol=1e-4, rtol=1e-3)
    assert handle.report().layers_patched == 7
    assert handle.report().calls_accelerated == 3 * 4 * 7
    assert "displaced" not in str(handle.report())
    handle.remove()
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


@pytest.mark.slow
def test_processors_that_nobody_keeps_are_not_kept_by_the_patch(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **ALWAYS)
    for _ in range(3):
        set_others(pipe)
        call(pipe.unet)
        handle.expect_new_run()
    gc.collect()
    assert [len(layer.earlier) for layer in handle._layers] == [0] * 14


def test_a_displaced_patch_can_be_copied(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    slice_attention(pipe)
    accelerated = tiny.run(pipe)
    twin = copy.deepcopy(pipe)
    diffattn.unpatch(twin)
    assert all(type(p) is SlicedAttnProcessor for p in twin.unet.attn_processors.values())
    assert torch.equal(tiny.run(pipe), accelerated)
    assert handle.report().calls_accelerated == 2 * 4 * 7


def test_a_pipeline_made_from_a_patched_one_is_patched_and_accelerated(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    tiny.run(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert find_patch(other) is handle
    tiny.run(other, image=tiny.picture(), strength=1.0)
    assert handle.report().calls_accelerated == 2 * 4 * 7
    other.unet.set_default_attn_processor()  # as diffusers' own test of from_pipe does
    tiny.run(other, image=tiny.picture(), strength=1.0)
    assert handle.report().calls_accelerated == 3 * 4 * 7
    diffattn.unpatch(other)
    assert find_patch(pipe) is None
    assert all(type(p) is AttnProcessor for p in pipe.unet.attn_processors.values())


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


def test_our_processors_that_come_back_after_removal_are_saved_as_the_original(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    ours = self_attention(pipe.unet)[MID].processor
    with pytest.raises(pickle.PicklingError, match=r"diffattn\.unpatch"):
        pickle.dumps(ours)
    handle.remove()
    self_attention(pipe.unet)[MID].set_processor(ours)
    assert type(pickle.loads(pickle.dumps(ours))) is AttnProcessor2_0
    torch.save(pipe.unet, io.BytesIO())


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
