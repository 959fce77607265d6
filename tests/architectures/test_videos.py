"""What runs exact in denoisers of videos: sharp heads, sparse and causal masks, layers over frames."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel, WanPipeline
from support.denoisers import CASES
from support.denoisers.case import Case

import diffattn
from diffattn.architectures import architecture_of

FEW: Any = {"num_agents": 6, "max_head_error": 0.5, "min_tokens": 0}
EVERY_HEAD: Any = FEW | {"max_head_error": float("inf")}


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def inputs(case: Case) -> dict[str, Any]:
    return case.inputs(2, torch.Generator().manual_seed(1))


def test_heads_too_sharp_for_landmarks_fall_back_one_by_one() -> None:
    case = case_of("WanTransformer3DModel")
    model, given = case.build(), inputs(case)
    with torch.no_grad():  # the first of two heads of the first layer; the other one is flat
        scale: Any = model.get_parameter("blocks.0.attn1.norm_q.weight")
        scale[: case.config["attention_head_dim"]] *= 30
        scale[case.config["attention_head_dim"] :] /= 10
    exact = case.call(model, given)
    with diffattn.patch(model, **(FEW | {"max_head_error": 1e9})) as handle:
        unchecked = case.call(model, given)
        assert [layer.exact_heads for layer in handle.report().layers if layer.accelerated] == [0, 0]
    with diffattn.patch(model, **FEW) as handle:
        out = case.call(model, given)
        first = next(layer for layer in handle.report().layers if layer.accelerated)
        assert (first.name, first.exact_heads) == ("blocks.0.attn1", 2), str(handle.report())
    assert torch.dist(out, exact) < torch.dist(unchecked, exact)


@pytest.mark.slow
def test_kandinskys_sparse_attention_runs_exact_and_is_counted() -> None:
    config = {**case_of("Kandinsky5Transformer3DModel").config, "axes_dims": (4, 6, 6), "model_dim": 32}
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(**config).eval()
    model.set_attention_backend("flex")
    tokens = (2, 8, 8)
    given = {
        "hidden_states": torch.randn(1, 2, 16, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 16),
        "visual_rope_pos": [torch.arange(n) for n in tokens],
        "text_rope_pos": torch.arange(6),
        "sparse_params": {"sta_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool), "to_fractal": True, "P": 0.9},
        "timestep": torch.tensor([700.0]),
    }
    with torch.no_grad():
        exact = model(**given).sample
        with diffattn.patch(model, **FEW) as handle:
            out = model(**given).sample
    assert torch.equal(out, exact)
    reasons = [layer.passed_through for layer in handle.report().layers if layer.left_alone is None]
    assert reasons == [{"masked by a BlockMask": 1}] * 2


def test_skyreels_causal_mask_runs_exact_and_is_counted() -> None:
    case = case_of("SkyReelsV2Transformer3DModel")
    model, given = case.build(), inputs(case)
    model._set_ar_attention(3)
    exact = case.call(model, given)
    with diffattn.patch(model, **FEW) as handle:
        assert torch.equal(case.call(model, given), exact)
    reasons = [layer.passed_through for layer in handle.report().layers if layer.left_alone is None]
    assert reasons == [{"masked: the mask differs between queries": 1}] * 2


@pytest.mark.parametrize(
    "name", ["UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "LatteTransformer3DModel"]
)
def test_layers_over_a_few_frames_are_listed_with_their_reason(name: str) -> None:
    case = case_of(name)
    model, given = case.build(), inputs(case)
    with diffattn.patch(model, **FEW) as handle:
        case.call(model, given)
    left = {layer.left_alone for layer in handle.report().layers if not layer.accelerated}
    assert left == {"temporal layer of a few frames", "cross-attention"}


def wan_with_experts(*names: str, boundary: float) -> WanPipeline:
    """A Wan 2.2 pipeline with these of its two denoisers; the second takes over below a share of the time steps."""
    torch.manual_seed(0)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "transformer_2"))
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[True] * 3)
    experts = {name: case_of("WanTransformer3DModel").build(seed) for seed, name in enumerate(names)}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(**parts | experts, vae=vae, scheduler=scheduler, boundary_ratio=boundary)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by_experts(pipe: WanPipeline) -> torch.Tensor:
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    settings: Any = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 4, "guidance_scale": 1.0}
    noise = torch.Generator().manual_seed(4)
    return pipe(prompt_embeds=text, generator=noise, output_type="latent", return_dict=False, **settings)[0]


def test_both_denoisers_of_wan_2_2_are_accelerated_in_one_run() -> None:
    pipe = wan_with_experts("transformer", "transformer_2", boundary=0.8)
    exact = drawn_by_experts(pipe)
    calls = Counter[str]()
    with diffattn.patch(pipe, **EVERY_HEAD) as handle:
        hooks = [
            getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
            for name in ("transformer", "transformer_2")
        ]
        out = drawn_by_experts(pipe)
        report, trace = handle.report(), handle.trace()
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2
    accelerated = {layer.name: layer.accelerated for layer in report.layers if layer.accelerated}
    assert accelerated == {
        **{f"blocks.{i}.attn1": calls["transformer"] for i in range(2)},
        **{f"transformer_2.blocks.{i}.attn1": calls["transformer_2"] for i in range(2)},
    }
    assert (report.runs, report.calls) == (1, 4)
    levels = [entry["noise_level"] for entry in trace]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == 4
    assert not torch.equal(out, exact)
    assert torch.equal(drawn_by_experts(pipe), exact)


def test_the_second_denoiser_of_wan_2_2_alone_is_accelerated() -> None:
    pipe = wan_with_experts("transformer_2", boundary=1.1)
    exact = drawn_by_experts(pipe)
    with diffattn.patch(pipe, **EVERY_HEAD) as handle:
        out = drawn_by_experts(pipe)
        report = handle.report()
    assert {layer.name: layer.accelerated for layer in report.layers if layer.accelerated} == {
        "blocks.0.attn1": 4,
        "blocks.1.attn1": 4,
    }
    assert not torch.equal(out, exact)


def test_frames_that_are_given_do_not_lower_the_noise_level() -> None:
    case = case_of("WanTransformer3DModel 2.2 TI2V")
    model, given = case.build(), inputs(case)
    times = torch.full((2, 72), 600.0)
    times[:, :24] = 0  # the frame that is given
    with diffattn.patch(model, **FEW) as handle, torch.no_grad():
        model(**given, timestep=times)
        entry = handle.last_call()
    assert entry is not None
    assert entry["noise_level"] == pytest.approx(0.6)


def test_frames_beside_the_video_count_as_its_own() -> None:
    case = case_of("LTXVideoTransformer3DModel conditions")
    model, given = case.build(), inputs(case)
    keyframe = given["video_coords"][:, :, :24]
    given["video_coords"] = torch.cat((keyframe, given["video_coords"]), dim=2)
    given["hidden_states"] = torch.cat((given["hidden_states"][:, :24], given["hidden_states"]), dim=1)
    size = architecture_of(model).size(model, given)
    assert (size.frames, size.height, size.width) == (4, 4, 6)


def test_an_odd_number_of_tokens_runs_exact_and_says_so() -> None:
    case = case_of("LTXVideoTransformer3DModel")
    model, given = case.build(), inputs(case)
    given["hidden_states"] = torch.cat((given["hidden_states"], given["hidden_states"][:, :5]), dim=1)
    coordinates = torch.arange(77.0).expand(2, 3, 77)
    with diffattn.patch(model, **FEW) as handle:
        handle.quiet()
        case.call(model, given | {"video_coords": coordinates})
    reasons = {reason for layer in handle.report().layers for reason in layer.passed_through}
    assert reasons == {"77 tokens do not form the layer's grid of 3x4x6"}
