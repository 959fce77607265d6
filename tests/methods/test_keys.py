"""Downsampled keys as a method: which tokens are reduced in which layouts, and what is refused."""

from typing import Any

import pytest
import torch
from support import tiny
from support.methods import LAYER, layer_call, qkv
from support.tensors import random
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn.functional import downsampled_attention
from diffattn.methods.base import LayerCall, TokenLayout
from diffattn.methods.keys import DownsampledKeys

KEYS = DownsampledKeys(min_tokens=0)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_it_is_the_function_on_the_layers_grid(grid: tuple[int, int], factor: int, pooled: bool) -> None:
    q, k, v = qkv(grid[0] * grid[1])
    out = DownsampledKeys(factor, pooled, min_tokens=0).build(LAYER)(q, k, v, LayerCall(x=None, grid=grid))
    assert torch.equal(out, downsampled_attention(q, k, v, grid, factor, pooled=pooled))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", [None, "of keys", "of context"])
def test_text_keeps_its_keys_and_its_exact_answers(first: bool, mask: str | None) -> None:
    layout = TokenLayout(((5, 7),), num_context=4, context_first=first, rotated=True)
    q, k, v = qkv(39)
    given: dict[str, Any] = {}
    if mask:
        given["mask"] = torch.where(random(2, 1, 1, 39, seed=5) > 0.5, -torch.inf, 0.0)
    if mask == "of context":
        given["context_mask"] = torch.where(random(2, 1, 4, 39, seed=6) > 0.5, -torch.inf, 0.0)
    out = KEYS.build(LAYER)(q, k, v, layer_call(layout, **given))
    exact = scaled_dot_product_attention(
        layout.context(q), k, v, attn_mask=given.get("context_mask", given.get("mask"))
    )
    torch.testing.assert_close(layout.context(out), exact)
    last = [torch.cat((layout.on_grid(x), layout.context(x)), dim=2) for x in (k, v)]
    key_mask = layout.split(given["mask"].mT) if mask else None
    key_mask = None if key_mask is None else torch.cat(key_mask, dim=2).mT
    picture = downsampled_attention(layout.on_grid(q), last[0], last[1], (5, 7), 2, key_mask=key_mask)
    torch.testing.assert_close(layout.on_grid(out), picture)


@pytest.mark.parametrize("grids", [((4, 6), (5, 5)), ((2, 4, 6), (4, 6))])
def test_pictures_beside_the_picture_are_downsampled_one_by_one(grids: tuple[tuple[int, ...], ...]) -> None:
    layout = TokenLayout(grids, num_context=3)
    q, k, v = qkv(layout.num_tokens + 3)
    out = KEYS.build(LAYER)(q, k, v, layer_call(layout))
    kept, sizes, start = [], [], 0
    for grid in grids:  # token by token
        h, w = grid[-2:]
        frames = grid[0] if len(grid) > 2 else 1
        for frame in range(frames):
            for y in range(0, h, 2):
                for x in range(0, w, 2):
                    kept.append(start + (frame * h + y) * w + x)
                    sizes.append(min(2, h - y) * min(2, w - x))
        start += frames * h * w
    kept += range(start, start + 3)
    bias = torch.tensor([*sizes, 1, 1, 1]).log()
    expected = scaled_dot_product_attention(q[:, :, :start], k[:, :, kept], v[:, :, kept], attn_mask=bias[None])
    torch.testing.assert_close(layout.on_grid(out), expected)


def test_rotated_tokens_are_never_averaged() -> None:
    rotated = TokenLayout(((8, 8),), rotated=True)
    assert DownsampledKeys().reason_layout(rotated) is None
    assert "rotated tokens cannot be averaged" in str(DownsampledKeys(pooled=True).reason_layout(rotated))


@pytest.mark.parametrize(("options", "message"), [
    ({"factor": 1}, "factor must be a whole number from 2 to 1024, got 1"),
    ({"factor": 2.0}, "factor must be a whole number from 2 to 1024, got 2.0"),
    ({"factor": True}, "got True"),
    ({"pooled": 1}, "pooled must be True or False, got 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownsampledKeys.from_options(options)


def test_the_published_preset_changes_the_highest_resolution_only(make_pipeline: Any) -> None:
    pipe = make_pipeline("sd")
    handle = diffattn.patch(pipe, "keys", preset="paper", min_tokens=0)
    tiny.run(pipe)
    levels = {layer.level for layer in handle.report().layers if layer.accelerated}
    assert levels == {0}
    assert "level 1 is not covered" in str(handle.report())
