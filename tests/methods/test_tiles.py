"""Tiles as a method: how many there are, what they see beside text, and what is refused."""

from typing import Any

import pytest
import torch
from support import tiny
from support.methods import LAYER, layer_call, qkv
from support.tensors import random
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn import DiffAttnWarning
from diffattn.functional import tiled_attention
from diffattn.methods.base import TokenLayout
from diffattn.methods.tiles import TiledAttention

TILES = TiledAttention(min_tokens=0)


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
    assert torch.equal(TILES.build(LAYER)(q, k, v, layer_call(layout)), tiled_attention(q, k, v, grid, (2, 2)))


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
    out = TILES.build(LAYER)(q, k, v, layer_call(layout, **given))
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


def test_layouts_that_it_cannot_divide_run_exact() -> None:
    method = TiledAttention()
    assert method.reason_layout(TokenLayout(((8, 8),), num_context=5, rotated=True)) is None
    assert "tokens of 2 pictures: tiles cover only one" in str(method.reason_layout(TokenLayout(((8, 8), (4, 4)))))
    single = TiledAttention(tile_size=8)
    assert single.reason_layout(TokenLayout(((3, 8, 8),))) == "a grid of 3x8x8 is a single tile"
    assert single.reason_layout(TokenLayout(((8, 9),))) is None


@pytest.mark.parametrize(("options", "message"), [
    ({"tiles": 1}, "tiles must be a whole number, 2 or more, or None, got 1"),
    ({"tiles": 2.0}, "tiles must be a whole number"),
    ({"tile_size": 0}, "tile_size must be a whole number, 1 or more, or None, got 0"),
    ({"tile_size": True}, "got True"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiledAttention.from_options(options)


def test_a_run_in_which_every_picture_is_one_tile_says_so(make_pipeline: Any) -> None:
    pipe = make_pipeline("sd")
    exact = tiny.run(pipe)
    with (
        diffattn.patch(pipe, "tiles", tile_size=32, min_tokens=0),
        pytest.warns(DiffAttnWarning, match="a grid of 16x16 is a single tile"),
    ):
        assert torch.equal(tiny.run(pipe), exact)
