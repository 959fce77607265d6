"""Patching: what runs where, the report, bad input, what to patch and how."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from support import tiny
from support.patching import ALWAYS, FEW, MID, ExactCalls, Make, call
from torch import nn

import diffattn
from diffattn import DiffAttnWarning


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


# Where exact attention runs, the processor's own call of it runs.


def test_layers_with_few_tokens_call_their_own_attention(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **(ALWAYS | {"min_tokens": 100}))  # level 0 has 256 tokens, level 1 has 64
    with ExactCalls() as calls:
        call(pipe.unet)
    patched = [layer for layer in handle.report().layers if layer.left_alone is None]
    assert calls.tokens == [64] * sum(layer.level == 1 for layer in patched)
    for layer in patched:
        assert layer.accelerated == (layer.level == 0)
        expected = {} if layer.level == 0 else {"64 tokens: exact attention is faster below 100": 1}
        assert layer.passed_through == expected


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
@pytest.mark.parametrize(("timestep", "exact_calls"), [(901, 0), (100, 7)])
def test_exact_phases_call_their_own_attention(pipe: DiffusionPipeline, timestep: int, exact_calls: int) -> None:
    diffattn.patch(pipe, **FEW, schedule={0.5: {}, 0.0: "exact"})
    with ExactCalls() as calls:
        call(pipe.unet, timestep=timestep)
    assert len(calls.tokens) == exact_calls


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


def test_the_report_says_how_many_heads_agents_missed(pipe: DiffusionPipeline) -> None:
    with diffattn.patch(pipe, **(FEW | {"max_head_error": 0.1})) as handle:
        tiny.run(pipe)
        some = [x for x in handle.report().layers if x.exact_heads and x.accelerated == 4]
        assert some
        for layer in some:
            assert layer.exact_heads == 4 * 3  # calls, heads of both samples
            assert "3 heads per accelerated call fell back to exact attention" in layer.note
        assert "fell back to exact attention" in str(handle.report())
    with diffattn.patch(pipe, **(FEW | {"max_head_error": 10})) as handle:
        tiny.run(pipe)
        assert {x.exact_heads for x in handle.report().layers} == {0}


@pytest.mark.slow
def test_a_layer_whose_heads_all_run_exact_calls_its_own_attention_and_is_looked_at_anew(
    pipe: DiffusionPipeline,
) -> None:
    exact = tiny.run(pipe, num_inference_steps=19)
    with diffattn.patch(pipe, **(FEW | {"max_head_error": 1e-9})) as handle:
        with pytest.warns(DiffAttnWarning, match="100% of the heads run exact, because diffattn would change"):
            found = tiny.run(pipe, num_inference_steps=19)
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
        for layer in (x for x in handle.report().layers if x.left_alone is None):
            assert layer.accelerated == 3  # the first call, and one after eight exact ones, twice
            assert layer.passed_through == {"100% of the heads are too far from exact attention": 16}


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


@pytest.mark.slow
def test_several_controlnets_are_all_patched(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("controlnet")
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


def test_a_controlnet_that_is_used_twice_is_patched_once(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("controlnet")
    nets = diffusers.MultiControlNetModel([pipe.controlnet] * 2)
    twice = type(pipe)(**(pipe.components | {"controlnet": nets}), requires_safety_checker=False)
    twice.set_progress_bar_config(disable=True)
    handle = diffattn.patch(twice, **FEW)
    names = {layer.name.rpartition(".down_blocks")[0] for layer in handle.report().layers}
    assert "controlnet.0" in names
    assert "controlnet.1" not in names
    tiny.run(twice, image=[tiny.picture()] * 2)
    assert all(layer.accelerated for layer in handle.report().layers if layer.left_alone is None)


class Passing(UNet2DConditionModel):
    """A UNet of one's own, which hands on what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_that_hands_on_its_arguments_is_accelerated(pipe: DiffusionPipeline) -> None:
    with diffattn.patch(pipe, **FEW):
        expected = tiny.run(pipe)
    model: Any = Passing.from_config(pipe.unet.config)
    model.eval()
    model.load_state_dict(pipe.unet.state_dict())
    pipe.unet = model
    with diffattn.patch(pipe, **FEW):
        assert torch.equal(tiny.run(pipe), expected)


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
        ({"preset": "fastest"}, "unknown preset of method 'agent': 'fastest'; allowed: balanced, fast, pooled, paper"),
        ({"num_agent": 4}, "unknown option num_agent of method 'agent'; allowed: num_agents, agent_ratio"),
        ({"num_agents": 0}, "num_agents must be .*got 0"),
        ({"num_agents": -3}, "num_agents must be .*got -3"),
        ({"num_agents": 2.5}, "num_agents must be .*got 2.5"),
        ({"num_agents": "many"}, "num_agents must be .*got 'many'"),
        ({"agent_ratio": 0.0}, "agent_ratio must be .*got 0.0"),
        ({"agent_ratio": 1.0}, "agent_ratio must be .*got 1.0"),
        ({"agent_ratio": float("nan")}, "agent_ratio must be .*got nan"),
        ({"agents": "attention"}, "agents must be 'pool', 'merge' or 'landmarks', or None, got 'attention'"),
        ({"merge_ratio": 1.0}, "merge_ratio must be .*got 1.0"),
        ({"merge_ratio": -0.1}, "merge_ratio must be .*got -0.1"),
        ({"merge_stride": 1}, "merge_stride must be .*got 1"),
        ({"merge_stride": 2.5}, "merge_stride must be .*got 2.5"),
        ({"scale_exponent": 2.0}, "scale_exponent must be .*got 2.0"),
        ({"shortcut": float("inf")}, "shortcut must be a finite number, got inf"),
        ({"shortcut": "a lot"}, "shortcut must be a finite number, got 'a lot'"),
        ({"min_tokens": -1}, "min_tokens must be .*got -1"),
        ({"max_level": -1}, "max_level must be .*got -1"),
        ({"layers": ["attn1"]}, "got attn1; they are: down_blocks.0"),
        ({"layers": 5}, "layers must be a list of names, or a function of a LayerSpec, got 5"),
        ({"layers": [MID, 5]}, "layers must be a list of names"),
        ({"layers": MID}, "layers must be a list of self-attention layers of this model, got mid_block"),
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
        ({"recipe": {1: 2, "x": 3}}, "unknown recipe key"),
        ({"recipe": {"options": {1: 2}}}, "unknown option 1 of method 'agent'"),
        ({"max_head_error": 10**400}, "max_head_error must be"),
        ({"method": ["agent"]}, r"unknown method: \['agent'\]"),
        ({"method": "keys", "factor": 10**30}, "factor must be"),
        ({"recipe": "no/such/file.json"}, "recipe 'no/such/file.json' is not a readable JSON file"),
    ],
    ids=lambda value: str(value).partition(' at 0x')[0],
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
def test_as_many_agents_as_tokens_run_exact_and_say_so(pipe: DiffusionPipeline, agents: str, num_agents: int) -> None:
    original = tiny.run(pipe)
    handle = diffattn.patch(pipe, **(ALWAYS | {"num_agents": num_agents, "agents": agents}))
    with pytest.warns(DiffAttnWarning, match=f"num_agents={num_agents} is not below the 256 tokens"):
        assert torch.equal(tiny.run(pipe), original)
    assert torch.equal(tiny.run(pipe), original)  # said once
    reasons = {reason for layer in handle.report().layers for reason in layer.passed_through}
    assert {reason.partition(":")[0] for reason in reasons} == {
        f"{num_agents} agents for {n} tokens" for n in (256, 64)
    }
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
    unet = diffusers.UNet1DModel(
        block_out_channels=(8,),
        extra_in_channels=0,
        down_block_types=("DownBlock1DNoSkip",),
        up_block_types=("UpBlock1DNoSkip",),
    )
    pipe = diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler())
    with pytest.raises(TypeError, match="nothing to accelerate in UNet1DModel: one-dimensional"):
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
    with pytest.raises(ValueError, match=r"nothing to patch in UNet2DConditionModel: it has no self-attention layer"):
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
    "options": {"num_agents": 6, "agent_ratio": None, "max_head_error": 10.0, "min_tokens": 0},
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
        methods: Any = handle.plan.methods
        assert [m.num_agents for m in methods] == [3, 9]


def test_a_file_that_is_not_json_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        diffattn.patch(pipe, recipe=tmp_path / "recipe.json")


@pytest.mark.parametrize("preset", diffattn.METHODS["agent"].presets)
@pytest.mark.parametrize("kind", ["sd", "inpaint"])
def test_every_preset_runs(make_pipeline: Make, preset: str, kind: str) -> None:
    pipe = make_pipeline(kind)
    original = tiny.run(pipe)
    fewer: Any = {"num_agents": 6} if preset != "paper" else {}
    handle = diffattn.patch(pipe, preset=preset, min_tokens=0, **fewer)
    assert not torch.allclose(tiny.run(pipe), original, atol=1e-4)
    assert handle.report().layers_accelerated > 0
