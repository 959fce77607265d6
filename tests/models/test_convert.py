"""Checkpoints: published outputs from official weights, and back; diffusers both ways; what cannot be converted."""

import warnings
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from support.reference import Case
from support.tiny_dit import dit_cases, inputs, run, tiny_dit, weights
from torch import Tensor

from diffattn.models import DiT

MODELS = ("mediator_sit_", "sit_official", "dit_official")


def from_case(case: Case, **overrides: Any) -> DiT:
    prediction = "epsilon" if case.name.startswith("dit") else "velocity"
    return DiT.from_official(weights(case), case.params["num_heads"], prediction, **overrides)


def guided(model: DiT, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
    """Official guidance: on the first three channels, both halves of the batch from the first half's latents."""
    half = x[: len(x) // 2]
    out = run(model, torch.cat([half, half]), t, y)
    conditional, unconditional = out[:, :3].chunk(2)
    both = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([both, both]), out[:, 3:]], dim=1)


def diffusers_dit(**overrides: Any) -> DiTTransformer2DModel:
    """Random, with the copies of the embedders that a converted checkpoint has."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        num_attention_heads=3, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=16, num_embeds_ada_norm=5
    )
    model = DiTTransformer2DModel(**(config | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        blocks: Any = model.transformer_blocks
        first, *others = blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def steps(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs with times as DiT has them."""
    return x, torch.tensor([3, 999])[: len(t)], y


# Official checkpoints.


@dit_cases(*MODELS)
def test_official_weights_give_the_published_outputs(case: Case) -> None:
    model = from_case(case)
    case.assert_close(run(model, case["in.x"], case["in.t"], case["in.y"]), "out.forward")


@dit_cases(*MODELS)
def test_official_weights_give_the_published_outputs_under_guidance(case: Case) -> None:
    model, (x, t, y) = from_case(case), (case[f"in.cfg_{name}"] for name in "xty")
    for scale in case.params["cfg_scales"]:
        case.assert_close(guided(model, x, t, y, scale), f"out.cfg_{scale}")


@dit_cases(*MODELS)
def test_the_configuration_is_read_from_the_shapes(case: Case) -> None:
    config, p = from_case(case).config, case.params
    epsilon = case.name.startswith("dit")
    assert config["sample_size"] == [p["input_size"]] * 2
    for name in ("patch_size", "in_channels", "hidden_size", "num_heads", "num_classes", "learn_sigma"):
        assert config[name] == p[name], name
    assert config["num_layers"] == p["depth"]
    assert config["prediction"] == ("epsilon" if epsilon else "velocity")
    assert config["time_direction"] == ("data_to_noise" if epsilon else "noise_to_data")
    assert config["null_class"]
    if "mediator_num" in p:
        assert config["mediators"] == [p["mediator_num"]]
        assert config["attention"] == ["mediator"] * p["depth"]


@dit_cases(*MODELS)
def test_official_weights_come_back_as_they_were(case: Case) -> None:
    official = from_case(case).to_official()
    assert official.keys() == weights(case).keys()
    for name, weight in weights(case).items():
        if name == "pos_embed":
            torch.testing.assert_close(official[name], weight, atol=1e-6, rtol=0)
        else:
            assert torch.equal(official[name], weight), name


@pytest.mark.parametrize("n", [4, 9, 16, 64])
def test_an_elastic_model_is_written_as_a_published_one_of_any_number(n: int) -> None:
    model = tiny_dit(learn_sigma=True, num_layers=3, attention=["mediator", "softmax", "mediator"])
    official = model.to_official(n)
    assert official["blocks.0.attn.an_bias"].shape == (3, n, 7, 7)
    fixed = DiT.from_official(official, num_heads=3)
    model.set_num_mediators(n)
    assert fixed.mediators == (n,)
    assert fixed.config["attention"] == ["mediator", "softmax", "mediator"]
    torch.testing.assert_close(run(fixed, *inputs()), run(model, *inputs()), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, official[k]) for k, a in model.to_official().items())


@pytest.mark.parametrize("config", [
    {"attention": "mediator", "sample_size": [8, 16], "mediators": [16]},
    {"attention": "softmax", "qk_norm": True, "mlp_ratio": 2.7, "patch_size": 4},
    {"attention": "softmax", "null_class": False, "prediction": "epsilon", "time_direction": "data_to_noise"},
])  # fmt: skip
def test_unusual_models_come_back_from_the_official_layout(config: dict[str, Any]) -> None:
    model = tiny_dit(**config)
    num_classes = None if model.config["null_class"] else 5
    back = DiT.from_official(model.to_official(), 3, model.config["prediction"], num_classes)
    x, t, _ = inputs(*((8, 16) if "sample_size" in config else (16, 16)))
    assert torch.equal(run(back, x, t, torch.tensor([0, 4])), run(model, x, t, torch.tensor([0, 4])))


def test_a_grid_that_is_not_square_is_told_when_no_bias_tells_it() -> None:
    model = tiny_dit(attention="softmax", sample_size=[8, 18])  # 4x9 tokens: as many as 6x6
    official = model.to_official()
    with pytest.raises(ValueError, match=r"not the fixed sin-cos embedding of a 6x6 grid.*pass sample_size"):
        DiT.from_official(official, num_heads=3)
    back = DiT.from_official(official, num_heads=3, sample_size=(8, 18))
    assert torch.equal(run(back, *inputs(8, 18)), run(model, *inputs(8, 18)))


def test_half_precision_weights_stay_half() -> None:
    official = {k: x.bfloat16() for k, x in tiny_dit().to_official().items()}
    model = DiT.from_official(official, num_heads=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_written_weights_are_copies() -> None:
    model = tiny_dit()
    before = run(model, *inputs())
    for weight in model.to_official().values():
        weight.zero_()
    assert torch.equal(run(model, *inputs()), before)


# Checkpoints that do not fit.


def test_missing_and_unexpected_weights_are_named_in_one_error() -> None:
    official = tiny_dit().to_official()
    for name in ("blocks.1.attn.dwc.bias", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight"):
        del official[name]
    official["optimizer.step"] = torch.zeros(1)
    with pytest.raises(ValueError, match="missing") as error:
        DiT.from_official(official, num_heads=3)
    for name in ("blocks.1.attn.dwc.bias", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight", "optimizer.step"):
        assert name in str(error.value)


def test_something_else_entirely_gives_a_short_error() -> None:
    others = {f"layer.{i}": torch.zeros(1) for i in range(50)} | {"blocks.90.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing weights: .* and \d+ more; unexpected: .* and \d+ more") as error:
        DiT.from_official(others, num_heads=3)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_heads": 4}, "num_heads=4, but the position biases are those of 3 heads"),
    ({"num_heads": 3, "prediction": "score"}, "prediction must be one of velocity, epsilon, got 'score'"),
    ({"num_heads": 3, "num_classes": 1000}, r"6 rows: num_classes must be 5 \(and a null class\) or 6, got 1000"),
])  # fmt: skip
def test_arguments_that_do_not_fit_the_weights_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT.from_official(tiny_dit(mediators=[4]).to_official(), **arguments)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads=5"):
        DiT.from_official(tiny_dit(attention="softmax").to_official(), num_heads=5)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("blocks.1.mlp.fc2.weight", (24, 90), r"blocks.1.mlp.fc2.weight \[24, 90\] \(must be \[24, 96\]\)"),
    ("final_layer.linear.weight", (48, 24), "must have 16 or 32 rows, got 48"),
    ("pos_embed", (1, 60, 24), r"pos_embed \[1, 60, 24\] is not the fixed sin-cos embedding of a 8x8 grid"),
    ("x_embedder.proj.weight", (24, 16), r"x_embedder.proj.weight \[24, 16\] \(must have 4 dimensions\)"),
    ("blocks.0.attn.an_bias", (3, 4), r"blocks.0.attn.an_bias \[3, 4\] \(must have 4 dimensions\)"),
    ("blocks.1.attn.an_bias", (3, 16, 7, 7), r"one number of mediators, got \[4, 16\]"),
])  # fmt: skip
def test_weights_of_the_wrong_shape_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    official = tiny_dit(mediators=[4]).to_official() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        DiT.from_official(official, num_heads=3)


def test_a_learned_position_embedding_is_refused() -> None:
    official = tiny_dit().to_official()
    official["pos_embed"] += 0.1
    with pytest.raises(ValueError, match=r"pos_embed \[1, 64, 24\] is not the fixed sin-cos embedding of a 8x8 grid"):
        DiT.from_official(official, num_heads=3)


# diffusers.


@pytest.mark.parametrize("channels", [4, 8])
def test_a_diffusers_model_gives_the_same_outputs_here(channels: int) -> None:
    theirs = diffusers_dit(out_channels=channels)
    ours = DiT.from_diffusers(theirs)
    assert ours.config["frequency_shift"] == 1
    assert ours.config["norm_eps"] == theirs.config["norm_eps"] == 1e-5
    assert ours.config["time_direction"] == "data_to_noise"
    batch = steps(*inputs())
    torch.testing.assert_close(run(ours, *batch), run(theirs, *batch), atol=1e-4, rtol=1e-4)


def test_and_goes_back_without_a_change_or_a_warning() -> None:
    theirs = diffusers_dit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = DiT.from_diffusers(theirs).to_diffusers()
    assert {k: back.config[k] for k in theirs.config if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    original = theirs.state_dict()
    assert back.state_dict().keys() == original.keys()
    assert all(torch.equal(weight, original[name]) for name, weight in back.state_dict().items())


@dit_cases("dit_official")
def test_official_weights_agree_with_diffusers_at_matched_frequencies_only(case: Case) -> None:
    official = from_case(case)
    with pytest.warns(UserWarning, match=r"10000\^\(-i/127\), this model 10000\^\(-i/128\).*t = 999"):
        theirs = official.to_diffusers()
    batch = case["in.x"], torch.tensor([1, 999]), case["in.y"]
    apart = (run(official, *batch) - run(theirs, *batch)).abs().amax(dim=(1, 2, 3))
    assert apart[1] > 0.01

    matched = DiT.from_config(official.config, frequency_shift=1.0)
    assert isinstance(matched, DiT)
    matched.load_state_dict(official.state_dict())
    torch.testing.assert_close(run(matched, *batch), run(theirs, *batch), **case.tolerance)
    again = DiT.from_diffusers(theirs)
    assert torch.equal(run(again, *batch), run(matched, *batch))
    for name, weight in again.to_official().items():
        assert torch.equal(weight, official.to_official()[name]), name


@pytest.mark.parametrize(("config", "message"), [
    ({}, "mediator layers"),
    ({"attention": ["agent", "mediator"]}, "agent and mediator layers"),
    ({"attention": "softmax", "qk_norm": True, "mlp_ratio": 2}, "qk_norm, mlp_ratio=2"),
    ({"attention": "softmax", "null_class": False}, "a label table without a null class"),
    ({"attention": "softmax", "sample_size": [8, 16]}, "a grid of 4x8 tokens"),
])  # fmt: skip
def test_what_diffusers_does_not_have_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DiTTransformer2DModel does not have {message}"):
        tiny_dit(**config).to_diffusers()


@pytest.mark.parametrize(("config", "message"), [
    ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate' to convert, got 'geglu'"),
    ({"attention_bias": False}, "attention_bias must be True"),
    ({"out_channels": 3}, "out_channels must be 4 or 8 to convert, got 3"),
])  # fmt: skip
def test_diffusers_models_of_another_kind_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT.from_diffusers(diffusers_dit(**config))


def test_embedders_that_differ_between_blocks_are_refused() -> None:
    theirs: Any = diffusers_dit()
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight += 1
    with pytest.raises(ValueError, match=r"transformer_blocks.1.norm1.emb.class_embedder.* differs from the copy"):
        DiT.from_diffusers(theirs)


def test_another_class_is_refused() -> None:
    other = UNet2DModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                        norm_num_groups=4)  # fmt: skip
    with pytest.raises(TypeError, match="expected a DiTTransformer2DModel, got UNet2DModel"):
        DiT.from_diffusers(other)  # type: ignore[arg-type]
