"""The processor around a method: with plain attention as the method it must equal diffusers' own, flag by flag."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.architectures import architecture_of, plain_attention
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall, Latest, RunState, Tally
from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, LayerSpec, Preset


@dataclass(frozen=True)
class PlainAttention(AttentionMethod):
    """Exact attention written as a method."""

    name: ClassVar[str] = "plain"
    presets: ClassVar[Mapping[str, Preset]] = {}

    def supports(self, layer: LayerSpec) -> bool:
        return True

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return None

    def build(self, layer: LayerSpec) -> AttentionFn:
        def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
            assert call.grid == (6, 4)
            assert call.x is not None
            assert call.x.shape[:2] == (q.shape[0], q.shape[2])
            return scaled_dot_product_attention(q, k, v, attn_mask=call.mask)

        return attention


def layer(**flags: Any) -> Attention:
    torch.manual_seed(0)
    options: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8} | flags
    attn = Attention(**options).eval()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attn


def state() -> RunState:
    """As in a call of a denoiser with 6x4 tokens."""
    run = RunState(Latest())
    run.begin(DenoiserCall(phase=0, grids=[(6, 4)], compiled=False))
    return run


def plugged(spec: LayerSpec, original: Any, run: RunState, tally: Tally) -> Any:
    parts = plain_attention.replaced(layer=spec, original=original, methods=[PlainAttention()], run=run, tally=tally)
    return parts.processor


def both(attn: Attention, x: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tally]:
    """The layer's own output, the output through our processor, and what ours counted."""
    spec = LayerSpec("layer", level=0, num_heads=2, head_dim=8)
    run, tally = state(), Tally()
    original = attn.processor
    with torch.no_grad():
        expected = attn(x, **more)
        attn.set_processor(plugged(spec, original, run, tally))
        out = attn(x, **more)
    attn.set_processor(original)
    return expected, out, tally


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "no output bias": {"out_bias": False},
    "inner width": {"dim_head": 20},
    "layer norm": {"qk_norm": "layer_norm"},
    "rms norm": {"qk_norm": "rms_norm", "eps": 1e-6},
    "fp32 layer norm": {"qk_norm": "fp32_layer_norm"},
    "group norm": {"norm_num_groups": 4},
    "residual": {"residual_connection": True},
    "rescaled": {"rescale_output_factor": 1.7},
    "deprecated block": {
        "norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2**0.5, "bias": True,
    },
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "unscaled": {"scale_qk": True},
}  # fmt: skip


@pytest.mark.parametrize("on_map", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_flag_of_attention_is_honoured(flags: dict[str, Any], on_map: bool) -> None:
    x = torch.randn(3, 16, 6, 4) if on_map else torch.randn(3, 24, 16)
    expected, out, tally = both(layer(**flags), x)
    assert tally.of("layer") == {ACCELERATED: 1}
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
@given(
    flags=st.lists(st.sampled_from(sorted(FLAGS)), max_size=4),
    on_map=st.booleans(),
    masked=st.booleans(),
    per_query=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_flags_may_be_combined(flags: list[str], on_map: bool, masked: bool, per_query: bool) -> None:
    combined: dict[str, Any] = {}
    for flag in flags:
        combined |= FLAGS[flag]
    x = torch.randn(2, 16, 6, 4) if on_map else torch.randn(2, 24, 16)
    mask = torch.randn(2, 24 if per_query else 1, 24) * 3 if masked else None
    expected, out, _ = both(layer(**combined), x, attention_mask=mask)
    torch.testing.assert_close(out, expected)


def test_spatial_norm_is_given_its_embedding() -> None:
    attn = layer(query_dim=32, spatial_norm_dim=8)
    expected, out, _ = both(attn, torch.randn(2, 32, 6, 4), temb=torch.randn(2, 8, 6, 4))
    torch.testing.assert_close(out, expected)


def test_dropout_stays_in_training() -> None:
    attn = layer(dropout=0.5).train()
    x = torch.randn(2, 24, 16)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = attn(x)
    spec = LayerSpec("layer", level=0, num_heads=2, head_dim=8)
    attn.set_processor(plugged(spec, attn.processor, state(), Tally()))
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_projections(bias: bool) -> None:
    attn = layer(bias=bias)
    with torch.no_grad():
        attn.fuse_projections(fuse=True)
    attn.set_processor(FusedAttnProcessor2_0())  # type: ignore[arg-type]
    expected, out, _ = both(attn, torch.randn(2, 24, 16))
    torch.testing.assert_close(out, expected)


def test_cross_attention_calls_go_to_the_original() -> None:
    attn = layer()
    context = torch.randn(2, 5, 16)
    expected, out, tally = both(attn, torch.randn(2, 24, 16), encoder_hidden_states=context)
    assert torch.equal(out, expected)
    assert tally.of("layer") == {"called as cross-attention": 1}


def test_tokens_that_form_no_grid_go_to_the_original() -> None:
    expected, out, tally = both(layer(), torch.randn(2, 25, 16))
    assert torch.equal(out, expected)
    assert tally.of("layer") == {"25 tokens do not form the layer's grid of 6x4": 1}


@pytest.mark.parametrize(("size", "levels"), [((64, 64), [(64, 64), (32, 32)]), ((17, 13), [(17, 13), (9, 7)])])
def test_grids_are_those_the_unet_makes(size: tuple[int, int], levels: list[tuple[int, int]]) -> None:
    unet = tiny.unet()
    assert architecture_of(unet).grids(unet, *size) == levels
    seen: set[tuple[int, int]] = set()
    for block in unet.down_blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.add(kwargs["hidden_states"].shape[-2:]), with_kwargs=True
        )
    with torch.no_grad():
        unet(torch.randn(1, 4, *size), 1, torch.randn(1, 2, tiny.WIDTH))
    assert seen == set(levels)


@pytest.mark.parametrize("sdxl", [False, True])
def test_levels_heads_and_kinds_of_layers_are_read_off_the_model(sdxl: bool) -> None:
    unet = tiny.unet(sdxl=sdxl)
    specs = {spec.name: spec for spec, _ in architecture_of(unet).layers(unet)}
    assert set(specs) == {name.removesuffix(".processor") for name in unet.attn_processors}
    assert {s.level for s in specs.values()} == ({1, 2} if sdxl else {0, 1})
    for name, spec in specs.items():
        module: Any = unet.get_submodule(name)
        assert spec.is_cross_attention == name.endswith("attn2")
        assert (spec.num_heads, spec.head_dim) == (module.heads, module.to_q.out_features // module.heads)
        assert not spec.upcast
    seen: dict[str, int] = {}
    for name in specs:
        if name.endswith("attn1"):
            unet.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: seen.__setitem__(name, args[0].shape[1])  # type: ignore[arg-type]
            )
    more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.zeros(1, 6)}} if sdxl else {}
    with torch.no_grad():
        unet(torch.randn(1, 4, 32, 32), 1, torch.randn(1, 2, unet.config["cross_attention_dim"]), **more)
    assert {name: 1024 // 4 ** specs[name].level for name in seen} == seen


def test_layers_that_ask_for_upcasting_say_so() -> None:
    unet = tiny.unet(upcast_attention=True)
    assert all(spec.upcast for spec, _ in architecture_of(unet).layers(unet))


def test_the_original_processor_is_diffusers_own() -> None:
    assert type(layer().processor) is AttnProcessor2_0
