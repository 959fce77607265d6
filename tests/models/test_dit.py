"""The DiT/SiT backbone: sizes, attention per layer, elastic mediators, any grid, checkpointing, saving, refusals."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.reference import Case
from support.tiny_dit import dit_cases, inputs, run, tiny_dit

from diffattn.functional import resize_axis
from diffattn.models import PRESETS, DiT
from diffattn.models.attention import ATTENTION
from diffattn.models.attention_layer import AttentionOptions
from diffattn.models.layers import position_embedding, time_features
from diffattn.models.mediator import MediatorAttention

KINDS = list(ATTENTION)
NORMED = [kind for kind in KINDS if kind != "mlla"]  # which has no norm of queries and keys


# Sizes, parts and the start.


@pytest.mark.parametrize(("size", "millions"), [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)])
def test_presets_have_the_published_numbers_of_parameters(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = DiT(**PRESETS[f"{size}/2"], learn_sigma=True)
    assert model.grid == (16, 16)
    embedding = position_embedding(model.grid, PRESETS[f"{size}/2"]["hidden_size"]).numel()  # the official one counts
    assert (sum(p.numel() for p in model.parameters()) + embedding) / 1e6 == pytest.approx(millions, abs=0.2)


def test_presets_are_every_size_with_every_patch() -> None:
    assert set(PRESETS) == {f"{size}/{patch}" for size, patch in product(["S", "B", "L", "XL"], [2, 4, 8])}
    assert PRESETS["B/4"] == {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 4}


@pytest.mark.parametrize("attention", KINDS)
def test_a_new_model_starts_at_zero_with_every_block_the_identity(attention: str) -> None:
    model = DiT(sample_size=16, hidden_size=24, num_layers=2, num_heads=3, attention=attention)
    assert torch.equal(run(model, *inputs()), torch.zeros(2, 4, 16, 16))
    tokens, condition = torch.randn(2, 64, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](tokens, condition, (8, 8), 16), tokens)


@dit_cases("mediator_interp_")
def test_position_embedding_is_the_published_one_at_both_resolutions(case: Case) -> None:
    for key, side in (("in.pos_embed", case.params["grid_in"]), ("out.pos_embed", case.params["grid_out"])):
        case.assert_close(position_embedding((side, side), case.params["hidden_size"]), key)


def test_position_embedding_of_a_wide_grid_is_a_part_of_a_square_one() -> None:
    square = position_embedding((6, 6), 16).unflatten(1, (6, 6))
    assert torch.equal(position_embedding((2, 6), 16).unflatten(1, (2, 6)), square[:, :2])


def test_time_features_have_the_frequencies_of_the_shift() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    for shift in (0.0, 1.0):
        features = time_features(t, shift)
        assert features.shape == (3, 256)
        last = 999 * 10000 ** (-127 / (128 - shift))
        torch.testing.assert_close(features[2, 127].item(), torch.tensor(last).cos().item())
        torch.testing.assert_close(features[2, 255].item(), torch.tensor(last).sin().item())


@dit_cases("mediator_attn_")
def test_a_mediator_layer_matches_the_published_implementation(case: Case) -> None:
    p, n = case.params, case.params["mediator_num"]
    grid = (p["grid"][0], p["grid"][1])
    layer = MediatorAttention(p["dim"], AttentionOptions(p["num_heads"], grid, mediators=(n,)))
    names = {key.removeprefix("w."): x for key, x in case.tensors.items() if key.startswith("w.")}
    layer.load_state_dict({(f"biases.{n}.{k}" if k.endswith("_bias") else k): x for k, x in names.items()})
    with torch.no_grad():
        case.assert_close(layer(case["in.x"], grid, n), "out.y")


# Attention per layer.


def test_attention_is_chosen_per_layer() -> None:
    model = tiny_dit(num_layers=3, attention=["mediator", "softmax", "agent"])
    names = [type(block.attn).__name__ for block in model.blocks]
    assert names == ["MediatorAttention", "SoftmaxAttention", "PooledAgentAttention"]
    assert any("blocks.0.attn.dwc" in key for key in model.state_dict())
    assert not any("blocks.1.attn.dwc" in key for key in model.state_dict())
    assert run(model, *inputs()).isfinite().all()


def test_agent_layers_run_with_the_weights_of_softmax_layers() -> None:
    softmax, agent = tiny_dit(attention="softmax"), tiny_dit(attention="agent", num_agents=16)
    agent.load_state_dict(softmax.state_dict())
    difference = (run(agent, *inputs()) - run(softmax, *inputs())).abs().max()
    assert difference > 1e-4
    exact = tiny_dit(attention="agent", num_agents=32)  # half the 64 tokens: not worth it
    assert torch.equal(run(exact, *inputs()), run(softmax, *inputs()))


@pytest.mark.parametrize("attention", NORMED)
def test_qk_norm_makes_the_output_indifferent_to_the_scale_of_queries(attention: str) -> None:
    model = tiny_dit(attention=attention, qk_norm=True)
    before = run(model, *inputs())
    with torch.no_grad():
        block: Any
        for block in model.blocks:
            block.attn.qkv.weight[:24] *= 3
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias[:24] *= 3
    torch.testing.assert_close(run(model, *inputs()), before, atol=1e-4, rtol=1e-4)


def test_velocity_leaves_the_learned_sigma_out_and_epsilon_returns_it() -> None:
    velocity = tiny_dit(learn_sigma=True)
    epsilon = tiny_dit(learn_sigma=True, prediction="epsilon", time_direction="data_to_noise")
    assert run(epsilon, *inputs()).shape == (2, 8, 16, 16)
    assert torch.equal(run(velocity, *inputs()), run(epsilon, *inputs())[:, :4])


def test_one_time_for_the_whole_batch_and_plain_tuples() -> None:
    model, (x, _, y) = tiny_dit(), inputs()
    with torch.no_grad():
        once = model(x, torch.tensor(0.3), y, return_dict=False)
    assert isinstance(once, tuple)
    assert torch.equal(once[0], run(model, x, torch.full((2,), 0.3), y))


# Elastic mediators.


def test_one_model_runs_at_every_number_of_mediators_and_starts_at_the_largest() -> None:
    model = tiny_dit()
    assert model.num_mediators == 64
    outputs = {}
    for n in (4, 9, 16, 25, 36, 49, 64):
        model.set_num_mediators(n)
        outputs[n] = run(model, *inputs())
        assert outputs[n].isfinite().all()
    for first, second in product(outputs, outputs):
        assert (first == second) == torch.equal(outputs[first], outputs[second])
    model.set_num_mediators(4)
    assert torch.equal(run(model, *inputs()), outputs[4])


@pytest.mark.parametrize("n", [4, 16, 64])
def test_every_number_of_the_set_is_a_model_of_its_own(n: int) -> None:
    elastic, fixed = tiny_dit(), tiny_dit(mediators=[n])
    shared = {k: x for k, x in elastic.state_dict().items() if ".biases." not in k or f".biases.{n}." in k}
    fixed.load_state_dict(shared)
    elastic.set_num_mediators(n)
    assert torch.equal(run(elastic, *inputs()), run(fixed, *inputs()))


def test_biases_between_two_numbers_are_blended_in_proportion_to_the_side() -> None:
    layer = tiny_dit().blocks[0].attn
    assert isinstance(layer, MediatorAttention)
    with torch.no_grad():
        for n, value in ((4, 1.0), (16, 3.0), (64, 7.0)):
            for bias in layer.biases[str(n)].parameters():
                bias.fill_(value)
    for n, value in ((4, 1.0), (9, 2.0), (16, 3.0), (25, 4.0), (49, 6.0), (64, 7.0)):
        for name, bias in layer.biases_at(n).items():
            assert n in bias.shape, name
            torch.testing.assert_close(bias, torch.full_like(bias, value))


def test_training_at_one_number_moves_its_biases_and_no_others() -> None:
    model = tiny_dit()
    model.set_num_mediators(16)
    model(*inputs()).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        idle = ".biases.4." in name or ".biases.64." in name
        assert (parameter.grad is None) == idle, name


# Grids and resolutions.


@given(h=st.integers(2, 7), w=st.integers(2, 7), attention=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=15)
def test_any_grid_runs_whether_configured_or_not(h: int, w: int, attention: str) -> None:
    own = tiny_dit(sample_size=[2 * h, 2 * w], attention=attention, mediators=[1, 4], num_agents=4)
    assert own.grid == (h, w)
    other = tiny_dit(attention=attention, mediators=[1, 4], num_agents=4)
    for model in (own, other):
        sample = run(model, *inputs(2 * h, 2 * w))
        assert sample.shape == (2, 4, 2 * h, 2 * w)
        assert sample.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (8, 24), (8, 32)])
def test_another_resolution_runs_with_resized_biases_and_its_own_position_embedding(size: tuple[int, int]) -> None:
    model, target = tiny_dit(), tiny_dit(sample_size=list(size), mediators=[4])
    model.set_num_mediators(4)
    h, w = size[0] // 2, size[1] // 2
    axes = {"ah_bias": (3, h), "aw_bias": (4, w), "ha_bias": (2, h), "wa_bias": (3, w)}
    resized = {}
    for key, x in model.state_dict().items():
        if ".biases." not in key or ".biases.4." in key:
            axis = axes.get(key.rpartition(".")[2])
            resized[key] = resize_axis(x, *axis) if axis else x
    target.load_state_dict(resized)
    torch.testing.assert_close(run(model, *inputs(*size)), run(target, *inputs(*size)))


def test_tokens_are_row_major_and_patches_find_their_place_again() -> None:
    """With every block the identity, an output patch depends on its input patch alone."""
    model = tiny_dit(attention="softmax")
    with torch.no_grad():
        block: Any
        for block in model.blocks:
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
    x, t, y = inputs(8, 12, batch=1)
    changed = x.clone()
    changed[:, :, 2:4, 8:10] += 1  # patch (1, 4)
    moved = (run(model, changed, t, y) - run(model, x, t, y)).abs().amax(dim=(0, 1)) > 0
    assert moved[2:4, 8:10].all()
    assert moved.sum() == 4


# Training machinery.


@pytest.mark.parametrize("attention", KINDS)
def test_gradient_checkpointing_equals_plain(attention: str) -> None:
    plain, checkpointed = (tiny_dit(attention=attention, num_agents=16).train() for _ in range(2))
    checkpointed.enable_gradient_checkpointing()
    outputs = []
    for model in (plain, checkpointed):
        if attention == "mediator":
            model.set_num_mediators(16)
        outputs.append(model(*inputs()).sample)
        if attention == "mediator":
            model.set_num_mediators(4)  # what is recomputed must not follow
        outputs[-1].square().mean().backward()
    assert torch.equal(outputs[0], outputs[1])
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("attention", KINDS)
def test_autocast_stays_near_fp32_and_bfloat16_weights_run(attention: str) -> None:
    model = tiny_dit(attention=attention, qk_norm=attention in NORMED)
    x, t, y = inputs()
    exact = run(model, x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, x, t, y)
    assert (mixed.float() - exact).norm() < 0.05 * exact.norm()
    half = run(model.to(torch.bfloat16), x.bfloat16(), t, y)  # type: ignore[arg-type]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
def test_a_model_compiles_into_one_graph_per_number_of_mediators() -> None:
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = tiny_dit()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for n in (4, 64, 4, 64):
        model.set_num_mediators(n)
        torch.testing.assert_close(run(compiled, *inputs()), run(model, *inputs()))
    assert graphs == 2


# Saving.


@pytest.mark.parametrize("attention", ["softmax", ["mediator", "agent"], ["circulant", "focused_linear"]])
def test_saved_models_come_back_the_same(attention: str | list[str], tmp_path: Path) -> None:
    model = tiny_dit(attention=attention, sample_size=[16, 24], learn_sigma=True, frequency_shift=1.0, qk_norm=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = DiT.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: (list(v) if isinstance(v, tuple) else v) for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(run(loaded, *inputs(16, 24)), run(model, *inputs(16, 24)))
    half = DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    x, t, y = inputs(16, 24)
    assert run(half, x.bfloat16(), t, y).dtype == torch.bfloat16


def test_models_saved_before_paths_were_recorded_are_of_the_linear_one(tmp_path: Path) -> None:
    tiny_dit(path="gvp").save_pretrained(tmp_path)
    assert DiT.from_pretrained(tmp_path).config.path == "gvp"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["path"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DiT.from_pretrained(tmp_path).config.path == "linear"


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_that_do_not_fit_the_configuration_are_named(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    kept["blocks.7.mlp.fc1.bias"] = kept.pop("blocks.1.mlp.fc1.bias")
    save_file(kept, file, {"format": "pt"})
    message = r"missing: blocks\.1\.mlp\.fc1\.bias; unexpected: blocks\.7\.mlp\.fc1\.bias"
    with pytest.raises(ValueError, match=message):
        DiT.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    _, found = DiT.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] == ["blocks.1.mlp.fc1.bias"]


# What is refused.


@pytest.mark.parametrize(("config", "message"), [
    ({"mediators": [5]}, "perfect square, got 5; the nearest are 4 and 9"),
    ({"mediators": [4, 100]}, "num_mediators=100 is 10x10 and larger than the grid of 8x8 tokens.*up to 64"),
    ({"mediators": []}, "at least one number"),
    ({"attention": "linear"}, "attention must be one of softmax, agent, mediator, .*circulant, got 'linear'"),
    ({"attention": ["softmax"]}, "one for each of 2 layers, got 1"),
    ({"prediction": "sample"}, "prediction must be one of velocity, epsilon, got 'sample'"),
    ({"time_direction": "up"}, "time_direction must be one of noise_to_data, data_to_noise, got 'up'"),
    ({"path": "vp"}, "path must be one of linear, gvp, got 'vp'"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"num_heads": -3}, "num_heads must be at least 1, got -3"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"hidden_size": 26}, "hidden_size must be a multiple of num_heads=3 and of 4, got 26"),
    ({"sample_size": [16, 15]}, "multiples of the patch size 2, got 16x15"),
    ({"patch_size": 32}, "multiples of the patch size 32, got 16x16"),
])  # fmt: skip
def test_configurations_that_cannot_be_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit(**config)


@pytest.mark.parametrize(("n", "message"), [
    (5, "perfect square, got 5"),
    (1, "from 4 to 64, got 1; this model has position biases for 4, 16, 64"),
    (81, "from 4 to 64, got 81"),
])  # fmt: skip
def test_numbers_of_mediators_out_of_range_are_refused_and_change_nothing(n: int, message: str) -> None:
    model = tiny_dit()
    with pytest.raises(ValueError, match=message):
        model.set_num_mediators(n)
    assert model.num_mediators == 64


def test_a_model_without_mediators_has_no_number_of_them() -> None:
    with pytest.raises(ValueError, match="num_mediators=16: this model has no mediator layers"):
        tiny_dit(attention="softmax").set_num_mediators(16)


@pytest.mark.parametrize(("ids", "null_class", "message"), [
    ([0, 6], True, r"class ids must be from 0 to 4, or 5 for no class; got \[6\]"),
    ([-1, 9], True, r"got \[-1, 9\]"),
    ([5, 1], False, r"class ids must be from 0 to 4; got \[5\]"),
])  # fmt: skip
def test_class_ids_out_of_range_are_refused(ids: list[int], null_class: bool, message: str) -> None:
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        tiny_dit(null_class=null_class)(x, t, torch.tensor(ids))


def test_images_that_do_not_fit_are_refused() -> None:
    model = tiny_dit()
    with pytest.raises(ValueError, match="multiples of the patch size 2, got 16x13"):
        run(model, *inputs(16, 13))
    with pytest.raises(ValueError, match=r"num_mediators=64 is 8x8 and larger than the grid of 4x8 tokens.*up to 16"):
        run(model, *inputs(8, 16))


def test_half_the_position_scale_keeps_the_positions_of_half_the_size() -> None:
    small, large = tiny_dit(), tiny_dit(sample_size=32, position_scale=0.5)
    every_second = large.pos_embed.unflatten(1, large.grid)[:, ::2, ::2].flatten(1, 2)
    assert torch.equal(every_second, small.pos_embed)
    assert not torch.equal(tiny_dit(sample_size=32).pos_embed, large.pos_embed)
    for convert in (large.to_official, large.to_diffusers):
        with pytest.raises(ValueError, match=r"position_scale=0\.5"):
            convert()
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="position_scale must be a finite number above 0"):
            tiny_dit(position_scale=scale)
