"""Calibrating is landmark attention, coasting reuses its result, and both take few operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import diffattn
from diffattn.functional import sample_tokens
from diffattn.functional import tokens as functional_tokens
from diffattn.functional.coasting import calibrate, coast
from diffattn.functional.landmark import (
    Context,
    Tokens,
    exact_heads,
    landmark_attention_and_error,
    landmark_attention_with_context,
)
from diffattn.methods import landmarks
from diffattn.methods.landmarks import _has_coarse_products

GRID, N = (32, 32), 64


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def smooth(batch: int, heads: int, dim: int, seed: int, scale: float = 1.0) -> Tensor:
    """Tokens [B, H, 1024, D] that change little from neighbour to neighbour, as a picture's."""
    coarse = normal(batch * heads, dim, 6, 6, seed=seed, scale=scale)
    fine = torch.nn.functional.interpolate(coarse, GRID, mode="bicubic")
    return fine.flatten(2).mT.unflatten(0, (batch, heads)).contiguous()


def tokens(sharp: float = 1.0, **more: Any) -> Tokens:
    q, k, v = (smooth(2, 3, 16, seed, s) for seed, s in ((0, sharp), (1, 1.0), (2, 1.0)))
    return Tokens(q, k, v, sample_tokens(q, GRID, N), sample_tokens(k, GRID, N), **more)


@pytest.mark.parametrize("sharp", [0.3, 1.0, 4.0])
def test_calibrating_is_landmark_attention(sharp: float) -> None:
    given = tokens(sharp)
    out, context, found = calibrate(given, 1e-5)
    expected, error = landmark_attention_and_error(
        given.q, given.k, given.v, given.query_landmarks, given.key_landmarks, 1e-5
    )
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(found.errors()), error, rtol=1e-2, atol=1e-3)
    assert context.shape[2] == 0


def test_coasting_on_the_same_tensors_is_calibrating() -> None:
    given = tokens(2.0)
    out, _, found = calibrate(given, 1e-5)
    torch.testing.assert_close(coast(given, 1e-5, found)[0], out)


def test_other_tokens_are_answered_exactly_and_masked_keys_are_no_keys() -> None:
    text, masked = 5, 2
    q, k, v = (torch.cat((smooth(2, 3, 16, s), normal(2, 3, text, 16, seed=s + 9)), dim=2) for s in range(3))
    mask = torch.ones(2, 1, 1, 1024 + text, dtype=torch.bool)
    mask[..., -masked:] = False
    landmarks = [sample_tokens(x[:, :, :1024], GRID, N) for x in (q, k)]
    bias = torch.zeros(2, 1, 1, N + text).masked_fill(torch.arange(N + text) >= N + text - masked, -torch.inf)
    bias[..., :N] = math.log(1024 / N)
    others = Context(*(x[:, :, 1024:] for x in (q, k, v)))
    given = Tokens(q[:, :, :1024], k, v, landmarks[0], landmarks[1], others, mask, bias)
    out, context, found = calibrate(given, 1e-5)
    exact = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(context, exact[:, :, 1024:], rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()
    again, text_again = coast(given, 1e-5, found)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(text_again, context)
    expected, _, error = landmark_attention_with_context(given, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(found.errors()), error, rtol=1e-2, atol=1e-3)


def test_heads_above_the_limit_are_named_and_recomputed() -> None:
    given = tokens(1.0)
    given.q[1, 2] = normal(1024, 16, seed=7, scale=6.0)
    given = Tokens(given.q, given.k, given.v, sample_tokens(given.q, GRID, N), given.key_landmarks)
    out, _, found = calibrate(given, 1e-5)
    missed = found.missed(0.5)
    assert missed is not None
    assert [x.tolist() for x in missed] == [[1], [2]]
    mended = exact_heads(out, missed, given.q, given.k, given.v)
    torch.testing.assert_close(mended[1, 2], scaled_dot_product_attention(given.q, given.k, given.v)[1, 2])
    assert torch.equal(mended[0], out[0])
    assert found.missed(10.0) is None


def test_values_without_any_difference_come_back() -> None:
    given = tokens()
    same = Tokens(given.q, given.k, torch.ones_like(given.v), given.query_landmarks, given.key_landmarks)
    out, _, found = calibrate(same, 1e-5)
    torch.testing.assert_close(out, same.v, rtol=1e-4, atol=1e-4)
    assert found.missed(0.1) is None


class Counting(TorchDispatchMode):
    """Counts the dispatched operations that are not views of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        is_view |= func in (torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format)
        is_view |= func is torch.ops.aten.new_empty.default
        if not is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> list[str]:
    with torch.no_grad(), Counting() as counted:
        run()
    return counted.names


@pytest.mark.parametrize(("device", "most"), [("cpu", (31, 16)), ("cuda", (29, 14))])
def test_operations_of_a_call(device: str, most: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":  # the operations of an accelerator, counted here
        monkeypatch.setattr(functional_tokens, "_mean_of_few", lambda x: x.mean(dim=(3, 5)))
    q, k, v = tokens().q, tokens().k, tokens().v

    def given() -> Tokens:
        return Tokens(q, k, v, sample_tokens(q, GRID, N), sample_tokens(k, GRID, N))

    _, _, known = calibrate(given(), 1e-5)
    calibrating = operations(lambda: calibrate(given(), 1e-5)[2].missed(10.0))
    coasting = operations(lambda: coast(given(), 1e-5, known))
    assert len(calibrating) <= most[0], calibrating
    assert len(coasting) <= most[1], coasting


def test_heads_that_cannot_be_factorised_keep_what_their_landmarks_gathered() -> None:
    given = tokens()
    alike = given.query_landmarks[:, :, :1].expand_as(given.query_landmarks)  # of rank 1
    same = Tokens(given.q, given.k, given.v, alike, given.key_landmarks)
    out, _, found = calibrate(same, 1e-12, guarded=True)
    expected, error = landmark_attention_and_error(same.q, same.k, same.v, alike, same.key_landmarks, 1e-12)
    assert error.isinf().all()
    assert torch.tensor(found.errors()).isinf().all()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_heads_that_stay_the_same_are_not_sent_again() -> None:
    _, _, found = calibrate(tokens(8.0), 1e-5)
    first, again = found.missed(1e-4), found.missed(1e-4)
    assert first is not None
    assert again is not None
    assert first[0] is again[0]
    assert first[1] is again[1]


def test_the_newer_settings_of_precision_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _has_coarse_products()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends, "fp32_precision", "bf16")  # `torch.get_float32_matmul_precision` then raises
        assert _has_coarse_products()
    assert not _has_coarse_products()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_of_less_precision_are_not_coasted_on(precision: str, tmp_path: Path) -> None:
    pipe, before, drawn = tiny.pipeline("sd", tmp_path), torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision(precision)
    try:
        for every in (1, 100):
            with diffattn.patch(pipe, **LANDMARKS, calibrate_every=every):
                drawn.append(tiny.run(pipe))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*drawn) == (precision == "high")


LANDMARKS: dict[str, Any] = {"num_agents": 16, "max_head_error": float("inf"), "min_tokens": 0}


@pytest.mark.slow
def test_runs_are_bit_equal_and_calibrations_are_renewed(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd", tmp_path)
    images = {}
    for every in (1, 3, 100):
        with diffattn.patch(pipe, **LANDMARKS, calibrate_every=every):
            images[every] = tiny.run(pipe)
            assert torch.equal(images[every], tiny.run(pipe))
    assert not torch.equal(images[1], images[3])
    assert not torch.equal(images[3], images[100])


@pytest.mark.slow
def test_an_accelerator_takes_the_heads_of_a_calibration_over_in_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, options = tiny.pipeline("sd", tmp_path), LANDMARKS | {"num_agents": 6, "max_head_error": 0.1}
    seen: list[list[int]] = []
    for at_once in (True, False):
        monkeypatch.setattr(landmarks, "_reads_at_once", lambda x, answer=at_once: answer)
        with diffattn.patch(pipe, **options, calibrate_every=3) as handle:
            image = tiny.run(pipe, num_inference_steps=7)
            assert torch.equal(image, tiny.run(pipe, num_inference_steps=7))
            seen.append([layer.exact_heads for layer in handle.report().layers])
    assert any(seen[1])
    assert seen[0] != seen[1]  # a calibration later


def test_what_was_sent_is_what_a_calibration_says() -> None:
    given = tokens(1.0)
    given.q[1, 2] = normal(1024, 16, seed=7, scale=6.0)
    found = calibrate(Tokens(given.q, given.k, given.v, sample_tokens(given.q, GRID, N), given.key_landmarks), 1e-5)[2]
    at_once, sent = found.missed(0.5), found.sent().missed(0.5)
    assert at_once is not None
    assert sent is not None
    assert [x.tolist() for x in at_once] == [x.tolist() for x in sent] == [[1], [2]]


@pytest.mark.slow
def test_guidance_in_separate_calls_keeps_a_calibration_for_each() -> None:
    unet, scheduler = tiny.unet(), tiny.scheduler()
    scheduler.set_timesteps(4)
    sides = [normal(1, 4, 16, 16, seed=s) for s in (1, 2)]
    text = normal(1, 2, tiny.WIDTH, seed=3)

    def call(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return unet(x, t, text.expand(len(x), -1, -1)).sample

    with diffattn.patch(unet, **LANDMARKS):
        together = [call(torch.cat(sides), t) for t in scheduler.timesteps]
    with diffattn.patch(unet, **LANDMARKS):
        apart = [torch.cat([call(side, t) for side in sides]) for t in scheduler.timesteps]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_option_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"calibrate_every must be a whole number, 1 or more, got 0"):
        diffattn.patch(tiny.unet(), calibrate_every=0)
