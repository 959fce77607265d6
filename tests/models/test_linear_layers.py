"""The layers of the linear family: the published layers and blocks, global tokens, other grids, options, starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.linear_family import FamilyCase, family_cases
from support.tensors import random
from support.tiny_dit import inputs, run, tiny_dit
from torch import Tensor, nn

from diffattn.functional import circulant_attention, resize_axis
from diffattn.models import DiT
from diffattn.models.attention import ATTENTION
from diffattn.models.attention_layer import Attention, AttentionOptions
from diffattn.models.circulant import CirculantAttention
from diffattn.models.focused_linear import FocusedLinearAttention
from diffattn.models.inline import InLineAttention
from diffattn.models.layers import DiTBlock
from diffattn.models.mlla import MambaLikeAttention

LINEAR = ["inline", "focused_linear", "mlla", "circulant"]
TAKE_GLOBAL = ["inline", "focused_linear"]


def options(case: FamilyCase, **own: Any) -> AttentionOptions:
    heads = case.params["heads"]
    return AttentionOptions(heads if isinstance(heads, int) else 1, case.grid, **own)


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of queries and of keys and values, where they are apart, in one."""
    kept = {name: x for name, x in weights.items() if name.split(".")[0] not in ("q", "kv")}
    if "q.weight" in weights:
        kept |= {f"qkv.{part}": torch.cat((weights[f"q.{part}"], weights[f"kv.{part}"])) for part in ("weight", "bias")}
    return kept


# The published layers and blocks.


@family_cases("inline_", without="inline_swin_8x8_exp")  # whose feature map the layer does not have
def test_inline_layers_match_the_published_implementation(case: FamilyCase) -> None:
    layer = InLineAttention(case.params["C"], options(case))
    layer.load_state_dict(fused(case.weights()))
    x = case.input()
    case.assert_matches(x, layer(x, case.grid, 0))


@family_cases("flatten_swin", "flatten_pvt_6x10")
def test_focused_linear_layers_match_the_published_implementation(case: FamilyCase) -> None:
    own = {"power": case.params["focusing_factor"], "kernel_size": case.params["kernel_size"]}
    layer = FocusedLinearAttention(case.params["C"], options(case), **own)
    layer.load_state_dict(fused(case.weights()))
    x = case.input()
    case.assert_matches(x, layer(x, case.grid, 0))


@family_cases("mlla_attn_")
def test_mamba_like_attention_matches_the_published_implementation(case: FamilyCase) -> None:
    layer = MambaLikeAttention(case.params["C"], case.params["heads"])
    layer.load_state_dict({name: x for name, x in case.weights().items() if not name.startswith("rope.")})
    x = case.input()
    case.assert_matches(x, layer(x, case.grid))


@family_cases("circulant_8x8", "circulant_7x7", "circulant_6x10")
def test_circulant_layers_match_the_published_implementation(case: FamilyCase) -> None:
    layer = CirculantAttention(case.params["C"], options(case))
    layer.load_state_dict(case.weights())
    x = case.input()
    case.assert_matches(x, layer(x, case.grid, 0))


def published_block(case: FamilyCase, attention: str, rename: Callable[[str], str]) -> Callable[[Tensor], Tensor]:
    """Our block as an unconditional one: the affine norms of the published one are its modulation, gates are open."""
    w, channels = case.weights(), case.params["C"]
    block = DiTBlock(channels, int(channels * case.params["mlp_ratio"]), attention, options(case), 1e-5)
    block.norm1.eps = 1e-5
    block.mlp.act = nn.GELU()
    kept = {rename(k): x for k, x in w.items() if not k.startswith("norm") and ".rope." not in k}
    one = torch.ones(channels)
    shifts = (w["norm1.bias"], w["norm1.weight"] - 1, one, w["norm2.bias"], w["norm2.weight"] - 1, one)
    kept["adaLN_modulation.1.weight"] = torch.zeros(6 * channels, channels)
    kept["adaLN_modulation.1.bias"] = torch.cat(shifts)
    block.load_state_dict(kept)
    return lambda x: block(x, torch.zeros(len(x), channels), case.grid, 0)


@family_cases("mlla_block_")
def test_mamba_like_blocks_match_the_published_implementation(case: FamilyCase) -> None:
    parts = ("act_proj", "in_proj", "out_proj", "dwc", "attn")
    block = published_block(case, "mlla", lambda name: f"attn.{name}" if name.split(".")[0] in parts else name)
    x = case.input()
    case.assert_matches(x, block(x))


@family_cases("circulant_block_")
def test_circulant_blocks_match_the_published_implementation(case: FamilyCase) -> None:
    block = published_block(case, "circulant", lambda name: name.replace("cpe.", "cpe1."))
    x = case.input()
    case.assert_matches(x, block(x))


# In the backbone.


@pytest.mark.slow
@pytest.mark.parametrize("attention", LINEAR)
def test_a_model_compiles_into_one_graph(attention: str) -> None:
    model = tiny_dit(attention=attention)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, *inputs()), run(model, *inputs()))


def test_every_attention_can_stand_beside_every_other() -> None:
    model = tiny_dit(num_layers=len(ATTENTION), attention=list(ATTENTION), num_agents=16).train()
    model.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs(16, 20)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        idle = ".biases." in name and ".biases.64." not in name
        assert idle or (parameter.grad is not None and parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", LINEAR)
def test_half_precision_weights_stay_finite_on_large_tokens(attention: str, dtype: torch.dtype) -> None:
    layer = ATTENTION[attention](24, AttentionOptions(3, (3, 4))).to(dtype)
    for scale in (0.0, 1.0, 10.0):  # InLine is of the third power: what it must be leaves fp16 soon
        x = (scale * random(2, 12, 24)).to(dtype).requires_grad_()
        out = layer(x, (3, 4), 0)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert torch.autograd.grad(out.float().mean(), x)[0].isfinite().all()


def test_circulant_layers_rescale_their_logits_on_another_grid() -> None:
    layer = CirculantAttention(8, AttentionOptions(2, (4, 4)))
    x = random(1, 6 * 10, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    core = circulant_attention(q * (16 / 60) ** 0.5, k, v, grid=(6, 10))
    torch.testing.assert_close(layer(x, (6, 10), 0), layer.proj(core * layer.gate(x)))


def test_a_position_encoding_is_resized_to_another_grid() -> None:
    model, target = (tiny_dit(attention="focused_linear", sample_size=size) for size in ([16, 16], [8, 24]))
    resized = {}
    for name, x in model.state_dict().items():
        is_encoding = name.endswith("positional_encoding")
        image = x.unflatten(1, (8, 8)) if is_encoding else x
        resized[name] = resize_axis(resize_axis(image, 1, 4), 2, 12).flatten(1, 2) if is_encoding else x
    target.load_state_dict(resized)
    torch.testing.assert_close(run(model, *inputs(8, 24)), run(target, *inputs(8, 24)))


@pytest.mark.parametrize("attention", TAKE_GLOBAL)
def test_global_tokens_join_attention_and_skip_the_convolution(attention: str) -> None:
    torch.manual_seed(0)
    layer = ATTENTION[attention](24, AttentionOptions(3, (3, 4)))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = random(2, 14, 24)
    out = layer(x, (3, 4), 0)
    assert out.shape == x.shape
    moved = x.clone()
    moved[:, 0] += 1
    assert (layer(moved, (3, 4), 0) - out)[:, 2:].abs().max() > 1e-4  # the picture sees a global token
    swapped = layer(x[:, [1, 0, *range(2, 14)]], (3, 4), 0)
    torch.testing.assert_close(swapped[:, [1, 0, *range(2, 14)]], out)  # which has no place
    with pytest.raises(ValueError, match="a grid of 4x4 has 16 tokens, the tensor has 14"):
        layer(x, (4, 4), 0)


@pytest.mark.parametrize("attention", ["mlla", "circulant"])
def test_global_tokens_are_refused_where_there_is_no_place_for_them(attention: str) -> None:
    layer = ATTENTION[attention](24, AttentionOptions(3, (3, 4)))
    message = f"{attention} attention takes no global tokens: a grid of 3x4 has 12 tokens, got 13"
    with pytest.raises(ValueError, match=message):
        layer(random(1, 13, 24), (3, 4), 0)
    with pytest.raises(ValueError, match="a grid of 3x4 has 12 tokens, the tensor has 11"):
        layer(random(1, 11, 24), (3, 4), 0)


@pytest.mark.parametrize(("config", "message"), [
    ({"attention": "focused_linear", "attention_options": {"focused_linear": {"power": 0.5}}},
     "power must be a finite number of at least 1, got 0.5"),
    ({"attention": "focused_linear", "attention_options": {"focused_linear": {"kernel_size": 4}}},
     "kernel_size must be an odd number of at least 1, got 4"),
    ({"attention": "focused_linear", "attention_options": {"focused_linear": {"p": 3}}},
     "attention_options: focused_linear has no option p; allowed: power, kernel_size"),
    ({"attention": "inline", "attention_options": {"inline": {"power": 3}}},
     "inline has no option power; allowed: none"),
    ({"attention": "inline", "attention_options": {"focused_linear": {"power": 3}}},
     "must be one of inline, got 'focused_linear'"),
    ({"attention": "inline", "attention_options": {"inline": 3}}, "inline must have options by name, got 3"),
    ({"attention": "mlla", "qk_norm": True}, "qk_norm=True.*mlla layers allow only False"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit(**config)


def test_options_of_one_attention_reach_its_layers_and_are_saved(tmp_path: Path) -> None:
    own = {"focused_linear": {"power": 4.5, "kernel_size": 3}}
    model = tiny_dit(attention=["softmax", "focused_linear"], attention_options=own)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    layer = loaded.blocks[1].attn
    assert isinstance(layer, FocusedLinearAttention)
    assert layer.power == 4.5
    assert layer.dwc.kernel_size == (3, 3)
    torch.testing.assert_close(run(loaded, *inputs()), run(model, *inputs()))


@pytest.mark.parametrize("attention", LINEAR)
def test_saved_models_come_back(attention: str, tmp_path: Path) -> None:
    model = tiny_dit(attention=attention)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    torch.testing.assert_close(run(loaded, *inputs()), run(model, *inputs()))


@pytest.mark.parametrize("attention", LINEAR)
def test_other_layouts_are_refused_by_name(attention: str) -> None:
    model = tiny_dit(attention=["softmax", attention], mlp_ratio=4.0)
    with pytest.raises(
        ValueError, match=f"official layout has no place for {attention} layers, only for layers of soft"
    ):
        model.to_official()
    with pytest.raises(ValueError, match=f"DiTTransformer2DModel does not have {attention} layers"):
        model.to_diffusers()


def test_layers_of_one_kind_take_all_of_each_other() -> None:
    for name in LINEAR:
        one, other = (ATTENTION[name](24, AttentionOptions(3, (3, 4))) for _ in range(2))
        assert isinstance(one, Attention)
        assert one.take(other).keys() == one.state_dict().keys()
