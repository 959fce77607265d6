"""Pictures beyond the contract: masks of the text's own, and calls that must run exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from support.denoisers.case import Case, normal
from support.denoisers.pictures import PICTURES, TEXT
from torch import Tensor

import diffattn

CASES = {case.name: case for case in PICTURES}
FEW: dict[str, Any] = {"num_agents": 6, "min_tokens": 0, "max_head_error": float("1e9")}


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def of_layer(case: Case, model: Any, given: Mapping[str, Any], name: str) -> Any:
    """The output of one attention layer in a call."""
    seen: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    case.call(model, given)
    handle.remove()
    return seen[0]


def text_first(out: Tensor) -> tuple[Tensor, Tensor]:
    return out[:, :TEXT], out[:, TEXT + 1 :]


@pytest.mark.parametrize(
    ("name", "layer", "text_and_picture"),
    [
        ("OmniGenTransformer2DModel padded", "layers.0.self_attn", text_first),
        ("Ideogram4Transformer2DModel texts of two lengths", "layers.0.attention", text_first),
        ("CogView4Transformer2DModel masked", "transformer_blocks.0.attn1", lambda out: (out[1], out[0])),
    ],
)
def test_a_text_with_masks_of_its_own_is_answered_exactly(
    name: str, layer: str, text_and_picture: Callable[[Any], tuple[Tensor, Tensor]]
) -> None:
    case = CASES[name]
    model, given = case.build(), case.inputs(2, rng())
    text, picture = text_and_picture(of_layer(case, model, given, layer))
    with diffattn.patch(model, **FEW) as handle:
        patched_text, patched_picture = text_and_picture(of_layer(case, model, given, layer))
        assert handle.accelerated(layer) == 1
    torch.testing.assert_close(patched_text, text, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(patched_picture, picture, rtol=1e-2)


def different_sizes(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"x": [given["x"][0], given["x"][1][..., :20]]}


def several_pictures(given: dict[str, Any]) -> dict[str, Any]:
    """As of Z-Image's omni pipeline: a picture to look at, and the one to draw."""
    pictures = [[x[..., :8], x] for x in given["x"]]
    texts = [[text[:20], text[20:]] for text in given["cap_feats"]]
    return given | {
        "x": pictures, "cap_feats": texts, "siglip_feats": [None, None], "image_noise_mask": [[0, 1], [0, 1]]
    }  # fmt: skip


def cached(mode: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def prepared(given: dict[str, Any]) -> dict[str, Any]:
        caches = GlmImageKVCache(num_layers=2)
        for cache in caches.caches:
            cache.store(normal(2, 48, 2, 8, rng=rng()), normal(2, 48, 2, 8, rng=rng()))
        caches.set_mode(mode)
        return given | {"kv_caches": caches}

    return prepared


def two_segments(given: dict[str, Any]) -> dict[str, Any]:
    segments = given["segment_ids"].clone()
    segments[:, : TEXT + 20] = 2
    return given | {"segment_ids": segments}


def other_shapes(given: dict[str, Any]) -> dict[str, Any]:
    first, _ = given["shape_list"]
    return given | {"shape_list": [first, first[::-1]]}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("ZImageTransformer2DModel", different_sizes, "pictures of different sizes in one batch"),
        ("ZImageTransformer2DModel", several_pictures, "several pictures between texts"),
        ("GlmImageTransformer2DModel", cached("read"), "KV cache"),
        ("GlmImageTransformer2DModel", cached("write"), "KV cache"),
        ("Ideogram4Transformer2DModel", two_segments, "packed segments"),
        ("JoyImageEditPlusTransformer3DModel", other_shapes, "pictures of different sizes in one batch"),
    ],
)
def test_what_no_method_can_follow_runs_exact_with_the_reason(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    case = CASES[name]
    case = case if change is not different_sizes else Case(**{**vars(case), "output": lambda out: out[0][1]})
    model, given = case.build(), case.inputs(2, rng())
    exact = case.call(model, change(given))
    with diffattn.patch(model, **FEW) as handle:
        handle.quiet()
        out = case.call(model, change(given))
        report = handle.report()
    assert torch.equal(out, exact)
    assert (report.calls_accelerated, report.calls_passed_through) == (0, case.num_layers)
    assert all(reason in why for layer in report.layers for why in layer.passed_through)


def test_a_kv_cache_that_is_skipped_changes_nothing() -> None:
    case = CASES["GlmImageTransformer2DModel"]
    model = case.build()
    with diffattn.patch(model, **FEW) as handle:
        case.call(model, cached("skip")(case.inputs(2, rng())))
        assert handle.report().calls_accelerated == case.num_layers


def test_the_tokens_of_hidream_may_come_packed() -> None:
    """As in training: tokens of pictures that are not square, padded, with their sizes."""
    case = CASES["HiDreamImageTransformer2DModel not square"]
    model, given = case.build(), case.inputs(2, rng())
    tokens, masks, sizes, ids = model.patchify(given["hidden_states"])
    packed = {"hidden_states": tokens, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}
    with diffattn.patch(model, **FEW) as handle:
        expected = case.call(model, given)
        out = case.call(model, given | packed)
        assert handle.report().calls_accelerated == 2 * case.num_layers
    torch.testing.assert_close(out, expected)


def test_both_transformers_of_ideogram_are_patched() -> None:
    case = CASES["Ideogram4Transformer2DModel"]
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": None, "text_encoder": None, "tokenizer": None}
    pipe = Ideogram4Pipeline(**parts, transformer=case.build(), unconditional_transformer=case.build(seed=1))
    given = case.inputs(2, rng())
    without_text = {k: v if k == "timestep" else v[:, TEXT:] for k, v in given.items()}
    exact = case.call(pipe.unconditional_transformer, without_text)
    with diffattn.patch(pipe, **FEW) as handle:
        case.call(pipe.transformer, given)
        assert not torch.equal(case.call(pipe.unconditional_transformer, without_text), exact)
        report = handle.report()
    assert (report.calls, report.calls_accelerated) == (1, 2 * case.num_layers)
