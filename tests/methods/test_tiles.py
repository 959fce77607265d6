"""Tiles as a method: how many there are, whom they see where text stands beside them, what it refuses."""

from typing import Any

import pytest
import torch
from support import tiny
from support.linear_family import random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn import DiffAttnWarning
from diffattn.functional import tiled_attention
from diffattn.methods.base import LayerCall, LayerSpec, TokenLayout
from diffattn.methods.tiles import TiledAttention
from diffattn.tuning.settings import settings_of

LAYER = LayerSpec("layer", level=0, num_heads=2, head_dim=8)
TILES = TiledAttention(min_tokens=0)


def qkv(tokens: int, batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(random(batch, 2, tokens, 8, seed=s) for s in range(3))


def call(layout: TokenLayout, **more: Any) -> LayerCall:
    return LayerCall(x=None, grid=layout.grid, layout=layout, **more)


@pytest.mark.parametrize(
    ("options", "grid", "expected"),
    [
        ({}, (64, 64), (2, 2)),
        ({"tiles": 4}, (64, 96), (4, 4)),
        ({"tile_size": 32}, (64, 96), (2, 3)),
        ({"tile_size": 32}, (65, 32), (3, 1)),
        ({"tile_size": 128}, (64, 64), (1, 1)),
        ({"tile_size": 32, "tiles": 4}, (64, 256), (4, 8)),
        ({"tiles": 8}, (3, 12, 5), (8, 5)),  # not more than rows or columns, and frames stay whole
    ],
)
def test_how_many_tiles(options: dict[str, Any], grid: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert TiledAttention(**options).on(grid) == expected


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 5, 7)])
def test_it_is_the_function_on_the_layers_grid(grid: tuple[int, ...]) -> None:
    layout = TokenLayout((grid,))
    q, k, v = qkv(layout.num_tokens)
    assert torch.equal(TILES.build(LAYER)(q, k, v, call(layout)), tiled_attention(q, k, v, grid, (2, 2)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", [None, "of keys", "of context"])
def test_text_is_seen_by_every_tile_and_answered_exactly(first: bool, mask: str | None) -> None:
    layout = TokenLayout(((4, 6),), num_context=4, context_first=first, rotated=True)
    q, k, v = qkv(28)
    given: dict[str, Any] = {}
    if mask:
        given["mask"] = torch.where(random(1, 1, 1, 28, seed=5) > 1, -torch.inf, 0.0)  # one for all samples
    if mask == "of context":
        given["context_mask"] = torch.where(random(2, 1, 4, 28, seed=6) > 0.5, -torch.inf, 0.0)
    out = TILES.build(LAYER)(q, k, v, call(layout, **given))
    exact = scaled_dot_product_attention(
        layout.context(q), k, v, attn_mask=given.get("context_mask", given.get("mask"))
    )
    torch.testing.assert_close(layout.context(out), exact)
    place = torch.arange(24)
    tile = place // 12 * 2 + place % 6 // 3
    text = torch.full((4,), -1)
    of_all = torch.cat((text, tile) if first else (tile, text))
    seen = torch.zeros(24, 28).masked_fill((tile[:, None] != of_all) & (of_all >= 0), -torch.inf)
    seen = seen + given["mask"] if mask else seen
    torch.testing.assert_close(
        layout.on_grid(out), scaled_dot_product_attention(layout.on_grid(q), k, v, attn_mask=seen)
    )


def test_a_batch_is_its_samples() -> None:
    q, k, v = qkv(39, batch=3)
    layout = TokenLayout(((5, 7),), num_context=4)
    mask = torch.where(random(3, 1, 1, 39, seed=5) > 0.5, -10_000.0, 0.0)
    attend = TILES.build(LAYER)
    together = attend(q, k, v, call(layout, mask=mask))
    for i in range(3):
        alone = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], call(layout, mask=mask[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_half_precision_where_logits_overflow() -> None:
    layer = LayerSpec("layer", level=0, num_heads=2, head_dim=8, upcast=True)
    q, k, v = (x * f for x, f in zip(qkv(36), (400, 400, 1), strict=True))
    q, k, v = (x.half() for x in (q, k, v))
    assert (q.float() @ k.float().mT).amax() > torch.finfo(torch.float16).max
    out = TILES.build(layer)(q, k, v, LayerCall(x=None, grid=(6, 6)))
    assert out.dtype == torch.float16
    exact = tiled_attention(q.double(), k.double(), v.double(), (6, 6), (2, 2))
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)


def test_what_it_declines() -> None:
    method = TiledAttention()
    assert method.declines(LAYER, 1024, "cpu", 1) is None
    assert "256 tokens: exact attention is faster below 1024" in str(method.slower(256, "cpu"))
    assert "the mask differs between queries" in str(method.declines(LAYER, 1024, "cpu", 1024))
    assert method.reason_layout(TokenLayout(((8, 8),), num_context=5, rotated=True)) is None
    assert "tokens of 2 pictures: tiles are those of one" in str(method.reason_layout(TokenLayout(((8, 8), (4, 4)))))
    single = TiledAttention(tile_size=8)
    assert single.reason_layout(TokenLayout(((3, 8, 8),))) == "a grid of 3x8x8 is a single tile"
    assert single.reason_layout(TokenLayout(((8, 9),))) is None
    assert not method.supports(LayerSpec("cross", 0, 4, 64, is_cross_attention=True))
    assert not TiledAttention(max_level=0).supports(LayerSpec("deep", 1, 4, 64))


@pytest.mark.parametrize(("options", "message"), [
    ({"tiles": 1}, "tiles must be a whole number, 2 or more, or None, got 1"),
    ({"tiles": 2.0}, "tiles must be a whole number"),
    ({"tile_size": 0}, "tile_size must be a whole number, 1 or more, or None, got 0"),
    ({"tile_size": True}, "got True"),
    ({"min_tokens": -1}, "min_tokens must be a whole number, 0 or more, or None, got -1"),
    ({"factor": 3}, "unknown option factor of method 'tiles'; allowed: tiles, tile_size, min_tokens, max_level"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiledAttention.from_options(options)


def test_the_tuner_may_choose_it() -> None:
    names = [s.method.name for s in settings_of()]
    assert names.count("tiles") == len(TiledAttention.candidates()) == 3


def test_a_run_in_which_every_picture_is_one_tile_says_so(make_pipeline: Any) -> None:
    pipe = make_pipeline("sd")
    exact = tiny.run(pipe)
    with (
        diffattn.patch(pipe, "tiles", tile_size=32, min_tokens=0),
        pytest.warns(DiffAttnWarning, match="a grid of 16x16 is a single tile"),
    ):
        assert torch.equal(tiny.run(pipe), exact)


def test_a_patched_model_compiles_whole_and_gives_the_same(make_pipeline: Any) -> None:
    unet = make_pipeline("sd").unet
    x, context = random(1, 4, 16, 14), random(1, 7, tiny.WIDTH)
    with torch.no_grad():
        with diffattn.patch(unet, "tiles", min_tokens=0):
            expected = unet(x, 500, context).sample
        compiled: Any = torch.compile(unet, backend="eager", fullgraph=True)
        with diffattn.patch(compiled, "tiles", min_tokens=0) as handle:
            out = compiled(x, 500, context).sample
            assert handle.report().calls_accelerated == 7
    torch.testing.assert_close(out, expected)
    torch._dynamo.reset()
