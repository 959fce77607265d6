"""Patching and what can happen to a patched model: displacement, odd layers and sizes, threads, bad input."""

import copy
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from watching import Watching

import diffattn
from diffattn import DiffAttnWarning

Make = Callable[[str], DiffusionPipeline]
FEW: dict[str, Any] = {"num_agents": 6, "agent_ratio": None, "min_tokens": 0}
ALWAYS: dict[str, Any] = FEW | {"schedule": {0.0: {}}}
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


@pytest.fixture(autouse=True)
def _no_thresholds_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(tmp_path / "none.json"))


def self_attention(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if name.endswith("attn1")}


@torch.no_grad()
def call(unet: UNet2DConditionModel, size: tuple[int, int] = (16, 16), timestep: Any = 901, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 7, tiny.WIDTH, generator=generator)
    dtype = next(unet.parameters()).dtype
    return unet(x.to(dtype), timestep, encoder_hidden_states=context.to(dtype), **more).sample


# Where exact attention runs, the original processor object runs.


def record(handle: diffattn.Patch) -> list[str]:
    """The layers whose original processors are called from now on, in order."""
    called: list[str] = []

    def recording(name: str, original: Any) -> Any:
        def processor(*args: Any, **kwargs: Any) -> Tensor:
            called.append(name)
            return original(*args, **kwargs)

        return processor

    for layer in handle._layers:
        if layer.processor is not None:
            layer.processor.original = recording(layer.spec.name, layer.processor.original)
    return called


def test_layers_with_few_tokens_call_the_original_processor(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **(ALWAYS | {"min_tokens": 100}))  # level 0 has 256 tokens, level 1 has 64
    called = record(handle)
    call(pipe.unet)
    levels = {layer.name: layer.level for layer in handle.report().layers if layer.left_alone is None}
    assert sorted(called) == sorted(name for name, level in levels.items() if level == 1)
    for layer in handle.report().layers:
        if layer.left_alone is None:
            assert layer.accelerated == (layer.level == 0)
            expected = {} if layer.level == 0 else {"64 tokens: exact attention is faster below 100": 1}
            assert layer.passed_through == expected


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
@pytest.mark.parametrize(("timestep", "exact_calls"), [(901, 0), (100, 7)])
def test_exact_phases_call_the_original_processor(pipe: DiffusionPipeline, timestep: int, exact_calls: int) -> None:
    handle = diffattn.patch(pipe, **FEW, schedule={0.5: {}, 0.0: "exact"})
    called = record(handle)
    call(pipe.unet, timestep=timestep)
    assert len(called) == exact_calls


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
def test_all_layers_exact_is_bit_by_bit_the_original(pipe: DiffusionPipeline) -> None:
    original = tiny.run(pipe)
    diffattn.patch(pipe, **(ALWAYS | {"min_tokens": 10_000}))
    assert torch.equal(tiny.run(pipe), original)


def test_the_defaults_leave_tiny_grids_exact(pipe: DiffusionPipeline) -> None:
    original = tiny.run(pipe)
    handle = diffattn.patch(pipe)
    with pytest.warns(DiffAttnWarning, match="256 tokens: exact attention is faster below"):
        assert torch.equal(tiny.run(pipe), original)
    assert handle.report().preset == "balanced"


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
    with pytest.warns(DiffAttnWarning, match="1 patched layers run without"):
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


# The report and the warnings.


def test_the_report_counts_layers_calls_and_reasons(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW, schedule={0.5: {}, 0.0: "exact"})
    fresh = handle.report()
    assert (fresh.runs, fresh.calls, fresh.layers_accelerated, fresh.layers_patched) == (0, 0, 0, 7)
    assert {x.tokens for x in fresh.layers} == {None}
    tiny.run(pipe)  # time steps 751, 501, 251, 1: the noise level is above a half in two of them
    tiny.run(pipe)
    report = handle.report()
    assert (report.runs, report.calls) == (2, 8)
    in_phase = report.layers[0].accelerated
    assert 0 < in_phase < 8
    patched = [x for x in report.layers if x.left_alone is None]
    assert len(patched) == 7
    for layer in patched:
        assert layer.accelerated == in_phase
        assert layer.passed_through == {"exact by schedule": 8 - in_phase}
        assert layer.tokens == {0: 256, 1: 64}[layer.level]
        assert layer.method == "agent"
    assert report.calls_accelerated == 7 * in_phase
    assert report.calls_passed_through == 7 * (8 - in_phase)
    assert not report.removed
    handle.remove()
    assert handle.report().removed


def test_the_report_goes_to_json_and_is_a_table(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, preset="balanced", **FEW)
    tiny.run(pipe)
    as_dict = json.loads(json.dumps(handle.report().to_dict()))
    assert as_dict["layers_patched"] == as_dict["layers_accelerated"] == 7
    assert as_dict["calls_accelerated"] + as_dict["calls_passed_through"] == 28
    assert (as_dict["method"], as_dict["preset"], as_dict["model"]) == ("agent", "balanced", "UNet2DConditionModel")
    assert {x["name"] for x in as_dict["layers"]} >= {MID}
    table = str(handle.report()).splitlines()
    assert table[0] == "UNet2DConditionModel: agent, preset balanced"
    assert table[1].split()[:5] == ["layer", "level", "tokens", "method", "accelerated"]
    row = next(line for line in table if line.startswith(MID))
    assert row.split()[1:4] == ["1", "64", "agent"]
    assert any(line.startswith("7 layers patched, 7 ran accelerated;") for line in table)


def test_layers_of_controlnets_are_named_and_counted(make_pipeline: Make) -> None:
    pipe = make_pipeline("controlnet")
    handle = diffattn.patch(pipe, **ALWAYS)
    tiny.run(pipe)
    report = handle.report()
    inside = [x for x in report.layers if x.name.startswith("controlnet.") and x.left_alone is None]
    assert len(inside) == 3
    assert all(x.accelerated == 4 for x in inside)
    assert report.calls == 4
    assert report.runs == 1
    diffattn.unpatch(pipe)
    assert not pipe.controlnet._forward_pre_hooks


def test_several_controlnets_are_all_patched(make_pipeline: Make) -> None:
    pipe = make_pipeline("controlnet")
    nets = diffusers.MultiControlNetModel([pipe.controlnet, tiny.controlnet()])
    pipe = type(pipe)(**(pipe.components | {"controlnet": nets}), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = [tiny.picture(0), tiny.picture(1)]
    original = tiny.run(pipe, image=pictures)
    handle = diffattn.patch(pipe, **ALWAYS)
    tiny.run(pipe, image=pictures)
    patched = [x.name for x in handle.report().layers if x.accelerated]
    assert sum(name.startswith("controlnet.0.") for name in patched) == 3
    assert sum(name.startswith("controlnet.1.") for name in patched) == 3
    handle.remove()
    assert torch.equal(tiny.run(pipe, image=pictures), original)


def test_a_run_with_nothing_accelerated_warns_once_with_the_reason(pipe: DiffusionPipeline) -> None:
    diffattn.patch(pipe, **(ALWAYS | {"min_tokens": 1000}))
    reason = "256 tokens: exact attention is faster below 1000"
    with pytest.warns(DiffAttnWarning, match=f"diffattn accelerates no layer in this run: {reason}"):
        tiny.run(pipe)
    tiny.run(pipe)  # here the warning would be an error


def test_a_short_img2img_run_that_is_exact_by_schedule_warns(make_pipeline: Make) -> None:
    pipe = make_pipeline("img2img")
    handle = diffattn.patch(pipe, **FEW, schedule={0.5: {}, 0.0: "exact"})
    with pytest.warns(DiffAttnWarning, match="exact by schedule"):
        tiny.run(pipe, strength=0.3, num_inference_steps=10)
    assert handle.report().calls_accelerated == 0
    tiny.run(pipe, strength=1.0)
    assert handle.report().calls_accelerated > 0


def test_a_controlnet_whose_own_layers_stay_exact_is_no_reason_to_warn(make_pipeline: Make) -> None:
    pipe = make_pipeline("controlnet")
    chosen = ["controlnet." + MID, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    handle = diffattn.patch(pipe, layers=chosen, **(ALWAYS | {"min_tokens": 100}))
    tiny.run(pipe)  # the ControlNet's layer has 64 tokens, the UNet's has 256
    assert handle.report().layers_accelerated == 1


def test_a_unet_that_stays_exact_beside_an_unpatched_controlnet_warns(make_pipeline: Make) -> None:
    pipe = make_pipeline("controlnet")
    diffattn.patch(pipe, layers=[MID], **(ALWAYS | {"min_tokens": 100}))
    with pytest.warns(DiffAttnWarning, match="64 tokens: exact attention is faster below 100"):
        tiny.run(pipe)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "linear"}, "unknown method: 'linear'; allowed: agent"),
        ({"preset": "fastest"}, "unknown preset of method 'agent': 'fastest'; allowed: balanced, fast, paper"),
        ({"num_agent": 4}, "unknown option num_agent of method 'agent'; allowed: num_agents, agent_ratio"),
        ({"num_agents": 0}, "num_agents must be .*got 0"),
        ({"num_agents": -3}, "num_agents must be .*got -3"),
        ({"num_agents": 2.5}, "num_agents must be .*got 2.5"),
        ({"num_agents": "many"}, "num_agents must be .*got 'many'"),
        ({"num_agents": None, "agent_ratio": None}, "num_agents.*agent_ratio"),
        ({"agent_ratio": 0.0}, "agent_ratio must be .*got 0.0"),
        ({"agent_ratio": 1.0}, "agent_ratio must be .*got 1.0"),
        ({"agent_ratio": float("nan")}, "agent_ratio must be .*got nan"),
        ({"agents": "attention"}, "agents must be 'pool' or 'merge', got 'attention'"),
        ({"merge_ratio": 1.0}, "merge_ratio must be .*got 1.0"),
        ({"merge_ratio": -0.1}, "merge_ratio must be .*got -0.1"),
        ({"merge_stride": 1}, "merge_stride must be .*got 1"),
        ({"merge_stride": 2.5}, "merge_stride must be .*got 2.5"),
        ({"scale_exponent": 2.0}, "scale_exponent must be .*got 2.0"),
        ({"shortcut": float("inf")}, "shortcut must be a finite number, got inf"),
        ({"shortcut": "a lot"}, "shortcut must be a finite number, got 'a lot'"),
        ({"min_tokens": -1}, "min_tokens must be .*got -1"),
        ({"max_level": -1}, "max_level must be .*got -1"),
        ({"layers": ["attn1"]}, "layers names attn1; the self-attention layers are: down_blocks.0"),
        ({"layers": MID}, "layers names mid_block"),
        ({"layers": []}, "nothing to patch in UNet2DConditionModel: .*not among the chosen layers"),
        ({"layers": lambda layer: layer.level == 5}, "not among the chosen layers"),
        ({"schedule": {0.5: {}}}, "a schedule needs an entry at 0.0"),
        ({"schedule": {0.0: "exact"}}, "exact at every noise level"),
        ({"schedule": {0.5: {"num_agent": 3}, 0.0: {}}}, "unknown option num_agent"),
        ({"schedule": {0.5: {"num_agents": 0}, 0.0: {}}}, "num_agents must be .*got 0"),
        ({"schedule": 5}, "schedule.*5"),
        ({"recipe": {"options": {"num_agent": 4}}}, "unknown option num_agent"),
        ({"recipe": {"method": "linear"}}, "unknown method: 'linear'"),
        ({"recipe": {"presets": "fast"}}, "unknown recipe key presets; allowed: method, preset, options"),
        ({"recipe": {"options": 5}}, "options.*5"),
        ({"recipe": {"schedule": 5}}, "schedule.*5"),
        ({"recipe": ["agent"]}, "recipe"),
        ({"recipe": "no/such/file.json"}, "recipe 'no/such/file.json' is not a readable JSON file"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_no_trace(
    pipe: DiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    before = pipe.unet.attn_processors
    with pytest.raises((ValueError, TypeError), match=message):
        diffattn.patch(pipe, **arguments)
    assert pipe.unet.attn_processors == before
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("agents", ["pool", "merge"])
@pytest.mark.parametrize("num_agents", [256, 1000])
def test_as_many_agents_as_tokens_are_refused_when_it_is_known(
    pipe: DiffusionPipeline, agents: str, num_agents: int
) -> None:
    original = tiny.run(pipe)
    diffattn.patch(pipe, **(ALWAYS | {"num_agents": num_agents, "agents": agents}))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"num_agents={num_agents} is not below the 256 tokens"):
            tiny.run(pipe)
    diffattn.unpatch(pipe)
    assert torch.equal(tiny.run(pipe), original)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), "Linear is not supported; supported: UNet2DConditionModel"),
        (5, "expected a diffusers pipeline or its denoiser, got int"),
        (None, "expected a diffusers pipeline or its denoiser, got NoneType"),
        ("stable-diffusion", "expected a diffusers pipeline or its denoiser, got str"),
        (tiny.vae(), "AutoencoderKL is not supported"),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("function", [diffattn.patch, diffattn.unpatch])
def test_what_is_not_a_supported_model_is_refused(function: Any, target: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(target)


def test_a_pipeline_without_a_denoiser_that_is_supported_is_refused() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match="UNet2DModel is not supported; supported: UNet2DConditionModel"):
        diffattn.patch(pipe)


def test_a_unet_without_self_attention_is_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
    )
    with pytest.raises(ValueError, match=r"nothing to patch in UNet2DConditionModel: it has no attention layer"):
        diffattn.patch(unet)


def test_a_level_that_the_model_lacks_attention_at_is_refused(make_pipeline: Make) -> None:
    with pytest.raises(ValueError, match=r"nothing to patch.*level 1 is not covered with these options"):
        diffattn.patch(make_pipeline("sdxl"), max_level=0)


def test_an_empty_prompt_works(pipe: DiffusionPipeline) -> None:
    diffattn.patch(pipe, **FEW)
    assert tiny.run(pipe, prompt="").isfinite().all()


# What to patch and how: layers, presets, recipes.


def test_layers_by_name_and_by_predicate(pipe: DiffusionPipeline) -> None:
    with diffattn.patch(pipe, layers=[MID], **FEW) as handle:
        tiny.run(pipe)
        assert [x.name for x in handle.report().layers if x.accelerated] == [MID]
        others = [x.left_alone for x in handle.report().layers if x.name.endswith("attn1") and x.name != MID]
        assert set(others) == {"not among the chosen layers"}
    with diffattn.patch(pipe, layers=lambda layer: layer.level == 0 and layer.head_dim == 8, **FEW) as handle:
        assert handle.report().layers_patched == 3
    with diffattn.patch(pipe, max_level=0, **FEW) as handle:
        assert {x.level for x in handle.report().layers if x.left_alone is None} == {0}


RECIPE = {
    "method": "agent",
    "options": {"num_agents": 6, "agent_ratio": None, "min_tokens": 0},
    "layers": [MID],
    "schedule": {"0.5": {"num_agents": 3}, "0.0": {}},
    "protocol": "found by hand",
}


def test_a_recipe_as_a_mapping_or_a_file_is_what_it_says(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    options = RECIPE["options"]
    with diffattn.patch(pipe, layers=[MID], schedule={0.5: {"num_agents": 3}, 0.0: {}}, **options):
        expected = tiny.run(pipe)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(RECIPE))
    for recipe in (RECIPE, file, str(file)):
        with diffattn.patch(pipe, recipe=recipe) as handle:
            assert torch.equal(tiny.run(pipe), expected)
            assert handle.report().layers_patched == 1


def test_arguments_beside_a_recipe_win(pipe: DiffusionPipeline) -> None:
    with diffattn.patch(pipe, recipe=RECIPE, layers=lambda layer: layer.level == 0, num_agents=9) as handle:
        assert {x.level for x in handle.report().layers if x.left_alone is None} == {0}
        assert [m.num_agents for m in handle.plan.methods] == [3, 9]


def test_a_file_that_is_not_json_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        diffattn.patch(pipe, recipe=tmp_path / "recipe.json")


@pytest.mark.parametrize("preset", diffattn.METHODS["agent"].presets)
@pytest.mark.parametrize("kind", ["sd", "inpaint"])
def test_every_preset_runs(make_pipeline: Make, preset: str, kind: str) -> None:
    pipe = make_pipeline(kind)
    original = tiny.run(pipe)
    handle = diffattn.patch(pipe, preset=preset, min_tokens=0, **({"num_agents": 6} if preset != "paper" else {}))
    assert not torch.allclose(tiny.run(pipe), original, atol=1e-4)
    assert handle.report().layers_accelerated > 0


# Masks and layers of other shapes: our output by hand.


def by_hand(attn: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None, kappa: float = 0.3) -> Tensor:
    """One attention layer with agents pooled to 2x3, written out with explicit matrices."""
    residual = x
    if x.ndim == 4:
        x = x.flatten(2).mT
    if attn.group_norm is not None:
        x = attn.group_norm(x.mT).mT

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = (heads(to(x)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    image = q.mT.flatten(0, 1).unflatten(2, grid)
    agents = nn.functional.adaptive_avg_pool2d(image, (2, 3)).flatten(2).mT.unflatten(0, q.shape[:2])
    scale = q.shape[-1] ** -0.5
    logits = agents @ k.mT * scale
    logits = logits if mask is None else logits + mask[:, None, None, :]
    out = (q @ agents.mT * scale**kappa).softmax(-1) @ logits.softmax(-1) @ v + 0.075 * v
    out = attn.to_out[0](out.transpose(1, 2).flatten(2))
    if residual.ndim == 4:
        out = out.mT.reshape(residual.shape)
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


def captured(unet: nn.Module, **more: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, its input, its output) of every self-attention layer in one call of a UNet."""
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], out: Tensor) -> None:
        seen.append((module, args[0], out))

    hooks = [
        m.register_forward_hook(keep, with_kwargs=True)
        for name, m in unet.named_modules()
        if hasattr(m, "set_processor") and "attn2" not in name
    ]
    call(unet, **more)
    for hook in hooks:
        hook.remove()
    return seen


HEIGHT, WIDTH = 12, 18  # 6 agents become 2x3 on this grid and on its half


def check_by_hand(unet: nn.Module, layers: int, mask: Tensor | None = None, **more: Any) -> None:
    handle = diffattn.patch(unet, **ALWAYS)
    seen = captured(unet, size=(HEIGHT, WIDTH), **more)
    assert len(seen) == layers == handle.report().calls_accelerated
    for attn, x, out in seen:
        tokens = x.shape[-2] * (x.shape[-1] if x.ndim == 4 else 1)
        grid = {216: (12, 18), 54: (6, 9)}[tokens]
        with torch.no_grad():
            torch.testing.assert_close(out, by_hand(attn, x, grid, mask), atol=1e-4, rtol=1e-3)


def test_every_layer_computes_the_formula() -> None:
    check_by_hand(tiny.unet(), layers=7)


def test_layers_on_feature_maps_with_norm_residual_and_rescaling_compute_the_formula() -> None:
    unet = tiny.unet(
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=8,
        mid_block_scale_factor=2**0.5,
    )
    attention = [m for m in unet.modules() if hasattr(m, "set_processor") and not m.is_cross_attention]
    assert sum(m.group_norm is not None and m.residual_connection for m in attention) == 6
    check_by_hand(unet, layers=7)


def test_query_and_key_norms_compute_the_formula() -> None:
    unet = tiny.unet()
    for i, layer in enumerate(self_attention(unet).values()):
        head_dim = layer.inner_dim // layer.heads
        layer.norm_q, layer.norm_k = nn.LayerNorm(head_dim), nn.RMSNorm(head_dim)
        nn.init.normal_(layer.norm_q.weight, mean=1, std=0.5, generator=torch.Generator().manual_seed(i))
    check_by_hand(unet, layers=7)


def one_level(**overrides: Any) -> UNet2DConditionModel:
    """Attention at level 0 only, so that one mask fits all layers."""
    return tiny.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        **overrides,
    )


def test_a_mask_over_the_keys_is_honoured() -> None:
    keep = torch.rand(2, HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0)) > 0.4
    check_by_hand(one_level(), layers=3, mask=(1 - keep.float()) * -10000.0, attention_mask=keep.float())


def test_a_mask_follows_its_sample_when_samples_are_in_different_phases() -> None:
    unet = one_level()
    diffattn.patch(unet, **FEW, schedule={0.5: {}, 0.0: "exact"})
    keep = (torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.WIDTH)

    @torch.no_grad()
    def run(steps: list[int], rows: slice) -> Tensor:
        t = torch.tensor(steps)
        return unet(x[rows], t, encoder_hidden_states=context[rows], attention_mask=keep[rows]).sample

    alone = torch.cat([run([901], slice(0, 1)), run([20], slice(1, 2))])
    torch.testing.assert_close(run([901, 20], slice(0, 2)), alone, atol=1e-5, rtol=1e-4)


def test_merged_tokens_pass_a_mask_on_to_the_original() -> None:
    unet = one_level()
    keep = (torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    exact = call(unet, attention_mask=keep)
    handle = diffattn.patch(unet, agents="merge", **ALWAYS)
    assert not torch.equal(call(unet), exact)
    assert torch.equal(call(unet, attention_mask=keep), exact)
    reasons = {r for x in handle.report().layers for r in x.passed_through}
    assert reasons == {"masked: merged tokens cannot follow a mask"}


# Sizes, devices, precision.


@pytest.mark.parametrize("agents", ["pool", "merge"])
@pytest.mark.parametrize("size", [(17, 13), (16, 24), (15, 16), (9, 31)])
def test_odd_and_non_square_latents_are_accelerated_at_every_level(size: tuple[int, int], agents: str) -> None:
    unet = tiny.unet()
    exact = call(unet, size=size)
    handle = diffattn.patch(unet, agents=agents, **ALWAYS)
    out = call(unet, size=size)
    assert handle.report().layers_accelerated == 7
    h, w = size
    levels = {0: h * w, 1: -(-h // 2) * -(-w // 2)}
    assert all(x.tokens == levels[x.level] for x in handle.report().layers if x.left_alone is None)
    assert out.shape == exact.shape
    assert not torch.allclose(out, exact, atol=1e-4)
    handle.remove()
    assert torch.equal(call(unet, size=size), exact)


def test_one_patched_denoiser_takes_many_sizes_in_turn() -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **ALWAYS)
    sizes = [(16, 16), (17, 13), (8, 32), (16, 16)]
    outs = [call(unet, size=size) for size in sizes]
    assert torch.equal(outs[0], outs[3])
    assert handle.report().calls_passed_through == 0


@pytest.mark.parametrize("agents", ["pool", "merge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_full(agents: str, dtype: torch.dtype) -> None:
    unet = tiny.unet()
    exact = call(unet)
    with diffattn.patch(unet, agents=agents, **ALWAYS):
        full = call(unet)
        unet.to(dtype)
        half = call(unet)
    assert half.dtype == dtype
    assert (half - full).abs().mean() < 0.5 * (exact - full).abs().mean() + 0.02


def sharpened(unet: UNet2DConditionModel, factor: float) -> UNet2DConditionModel:
    with torch.no_grad():
        for layer in self_attention(unet).values():
            layer.to_q.weight.mul_(factor)
            layer.to_k.weight.mul_(factor)
    return unet


@pytest.mark.parametrize("agents", ["pool", "merge"])
def test_layers_that_ask_for_upcasting_do_not_overflow_in_fp16(agents: str) -> None:
    unet = sharpened(tiny.unet(upcast_attention=True), 600).half()
    handle = diffattn.patch(unet, agents=agents, **ALWAYS)
    largest = max(
        (layer.to_q(x).float() @ layer.to_k(x).float().mT).abs().max().item() for layer, x, _ in captured(unet)
    )
    assert largest > torch.finfo(torch.float16).max
    out = call(unet)
    assert handle.report().layers_accelerated == 7
    assert out.isfinite().all()
    for _, _, layer_out in captured(unet):
        assert layer_out.isfinite().all()


@pytest.mark.parametrize("hook_first", [True, False])
def test_the_hooks_of_accelerate_and_ours_get_along(hook_first: bool) -> None:
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` put around a denoiser."""
    unet = tiny.unet()
    exact = call(unet)
    with diffattn.patch(unet, **ALWAYS):
        expected = call(unet)
    if hook_first:
        add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        handle = diffattn.patch(unet, **ALWAYS)
    else:
        handle = diffattn.patch(unet, **ALWAYS)
        add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(call(unet), expected)
    assert handle.report().layers_accelerated == 7
    handle.remove()
    assert torch.equal(call(unet), exact)
    remove_hook_from_module(unet)
    assert torch.equal(call(unet), exact)


def test_inference_mode(pipe: DiffusionPipeline) -> None:
    diffattn.patch(pipe, **FEW)
    expected = tiny.run(pipe)
    with torch.inference_mode():
        assert torch.equal(tiny.run(pipe), expected)
    assert torch.equal(tiny.run(pipe), expected)


def test_cpu_autocast_is_followed(pipe: DiffusionPipeline) -> None:
    unet = pipe.unet
    diffattn.patch(pipe, **ALWAYS)
    full = call(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = call(unet)
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


def test_a_lora_on_the_projections_is_followed(pipe: DiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    handle = diffattn.patch(pipe, **ALWAYS)
    before = call(pipe.unet)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    with_lora = call(pipe.unet)
    assert not torch.allclose(with_lora, before, atol=1e-4)
    assert handle.report().layers_patched == 7
    pipe.unet.disable_adapters()
    torch.testing.assert_close(call(pipe.unet), before, atol=1e-5, rtol=1e-4)


def test_a_module_called_outside_its_denoiser_runs_exact(pipe: DiffusionPipeline) -> None:
    layer = self_attention(pipe.unet)[MID]
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        exact = layer(x)
        handle = diffattn.patch(pipe, **FEW)
        assert torch.equal(layer(x), exact)
    assert handle.report().calls_accelerated == 0


def test_a_patched_pipeline_saves_as_the_original(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    original = tiny.run(pipe)
    diffattn.patch(pipe, **FEW)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.run(loaded), original)


def test_controlnet_guess_mode(make_pipeline: Make) -> None:
    """The ControlNet gets half the batch of the UNet."""
    pipe = make_pipeline("controlnet")
    original = tiny.run(pipe, guess_mode=True)
    with diffattn.patch(pipe, **ALWAYS) as handle:
        assert not torch.allclose(tiny.run(pipe, guess_mode=True), original, atol=1e-4)
        assert handle.report().calls_passed_through == 0
        assert handle.report().runs == 1
    assert torch.equal(tiny.run(pipe, guess_mode=True), original)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread, as on a GPU"])
def test_gradient_checkpointing_recomputes_what_ran(elsewhere: bool) -> None:
    def gradients(checkpointing: bool) -> Tensor:
        unet = tiny.unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        diffattn.patch(unet, **ALWAYS)
        torch.manual_seed(0)
        x, context = torch.randn(1, 4, 16, 16, requires_grad=True), torch.randn(1, 7, tiny.WIDTH)
        loss = unet(x, 901, context).sample.square().sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result() if elsewhere else loss.backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-4, rtol=1e-3)


# Schedulers in whole runs.


@pytest.mark.parametrize(
    ("name", "options", "calls"),
    [
        ("DDIMScheduler", {}, 6),
        ("PNDMScheduler", {"skip_prk_steps": True}, 7),
        ("HeunDiscreteScheduler", {}, 11),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 6),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 6),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 6),
        ("LCMScheduler", {}, 6),
        ("EDMEulerScheduler", {}, 6),
    ],
)
def test_a_run_falls_through_its_phases_once_with_any_scheduler(
    pipe: DiffusionPipeline, name: str, options: dict[str, Any], calls: int
) -> None:
    sd = {} if name.startswith("EDM") else {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = getattr(diffusers, name)(**sd, **options)
    schedule = Watching({0.7: {}, 0.4: {"num_agents": 9}, 0.0: "exact"})
    handle = diffattn.patch(pipe, **FEW, schedule=schedule)
    phases = schedule.seen_phases
    for runs in (1, 2):
        phases.clear()
        assert tiny.run(pipe, num_inference_steps=6).isfinite().all()
        assert phases == sorted(phases)
        assert set(phases) == {0, 1, 2}
        assert (handle.report().runs, handle.report().calls) == (runs, calls * runs)


def test_an_aborted_run_leaves_nothing_behind(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    expected = tiny.run(pipe)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    for runs in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, callback_on_step_end=stop)  # after the first step: the next run starts at the same level
        assert torch.equal(tiny.run(pipe), expected)
        assert handle.report().runs == runs + 1


class EveryOther:
    """A schedule of a user's own: agents in every other call."""

    def __init__(self) -> None:
        self.phases = ({}, None)
        self.seen: list[tuple[int, torch.Size, list[float], int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "EveryOther":
        new = EveryOther()
        new.seen = self.seen  # every run has its own copy; here they tell the first what they saw
        return new

    def start(self, batch: int) -> None:
        self.batch, self.calls = batch, 0

    def observe(self, latents: Tensor, noise_levels: list[float]) -> None:
        self.calls += 1
        self.seen.append((self.batch, latents.shape, list(noise_levels), self.phase()))

    def phase(self) -> int:
        return (self.calls + 1) % 2

    def reachable(self, noise_levels: Any) -> set[int]:
        return {0, 1}


def test_a_schedule_of_ones_own(pipe: DiffusionPipeline) -> None:
    schedule = EveryOther()
    handle = diffattn.patch(pipe, schedule=schedule, **FEW)
    for _ in range(2):
        tiny.run(pipe, num_inference_steps=5)
    assert [(batch, shape) for batch, shape, *_ in schedule.seen] == [(2, (2, 4, 16, 16))] * 10
    assert [phase for *_, phase in schedule.seen] == [0, 1, 0, 1, 0] * 2
    levels = [levels for *_, levels, _ in schedule.seen[:5]]
    assert levels == sorted(levels, reverse=True)
    assert (handle.report().calls_accelerated, handle.report().calls_passed_through) == (7 * 6, 7 * 4)


# Threads.


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
def test_two_threads_on_one_patched_denoiser_do_not_mix() -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **FEW, schedule={0.6: {}, 0.3: {"num_agents": 20}, 0.0: "exact"})
    plans = {
        0: ((16, 16), [951, 800, 600, 400, 200, 20]),
        1: ((12, 20), [20, 200, 951, 400, 20, 951]),
    }

    def run(which: int) -> list[Tensor]:
        size, steps = plans[which]
        return [call(unet, size=size, timestep=torch.tensor(t)) for t in steps]

    alone = {which: run(which) for which in plans}
    calls = handle.report().calls_accelerated
    barrier = threading.Barrier(2)

    def both_are_inside_a_forward(*_: Any) -> None:
        barrier.wait(20)

    meet = unet.conv_in.register_forward_pre_hook(both_are_inside_a_forward)
    with ThreadPoolExecutor(2) as pool:
        together = dict(zip(plans, pool.map(run, plans), strict=True))
    meet.remove()
    for which in plans:
        for a, b in zip(together[which], alone[which], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert handle.report().calls_accelerated == 2 * calls


def test_two_threads_with_a_pipeline_each_around_one_patched_denoiser_do_not_mix(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    other = type(pipe)(**(pipe.components | {"scheduler": tiny.scheduler()}), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    runs = [(pipe, 1, "a cat", 6), (other, 2, ["a dog", "a bird"], 9)]

    def run(which: int) -> Tensor:
        pipe, seed, prompt, steps = runs[which]
        return tiny.run(pipe, seed=seed, prompt=prompt, num_inference_steps=steps)

    alone = [run(0), run(1)]
    calls = handle.report().calls_accelerated
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert handle.report().calls_accelerated == 2 * calls


# Properties.

UNET = tiny.unet()


@given(
    size=st.tuples(st.integers(4, 22), st.integers(4, 22)),
    agents=st.sampled_from(["pool", "merge"]),
    num_agents=st.one_of(st.none(), st.integers(1, 15)),
    agent_ratio=st.one_of(st.none(), st.floats(0.5, 0.999)),
    merge_ratio=st.floats(0, 0.9),
    merge_stride=st.integers(2, 5),
    scale_exponent=st.floats(0, 1),
    shortcut=st.floats(-0.5, 0.5),
    timestep=st.integers(0, 999),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
def test_any_size_with_any_options_is_finite_and_restored(
    size: tuple[int, int], timestep: int, num_agents: int | None, agent_ratio: float | None, **options: Any
) -> None:
    if num_agents is None and agent_ratio is None:
        num_agents = 2
    exact = call(UNET, size=size, timestep=timestep)
    options |= {"num_agents": num_agents, "agent_ratio": agent_ratio, "min_tokens": 0, "schedule": {0.0: {}}}
    with diffattn.patch(UNET, **options) as handle:
        out = call(UNET, size=size, timestep=timestep)
        report = handle.report()
    assert out.shape == exact.shape
    assert out.isfinite().all()
    assert report.calls_accelerated + report.calls_passed_through == 7
    assert torch.equal(call(UNET, size=size, timestep=timestep), exact)
