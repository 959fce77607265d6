"""Attention through landmarks: its formula, where it is exact, how close it comes, and how it stays stable."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import random, relative_error
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from diffattn.functional import agent_attention, landmark_attention, pool_tokens, sample_tokens
from diffattn.functional.landmark import (
    MAX_DAMPING,
    Context,
    Tokens,
    correct,
    damp,
    exact_at,
    exact_where_missed,
    landmark_attention_and_error,
    landmark_attention_with_context,
    probe_tokens,
    solve_cholesky,
    solve_in_two,
    trust,
)
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerCall, LayerSpec


def smooth(side: int, dim: int, seed: int, scale: float = 1.0, coarse: int = 6) -> Tensor:
    """Tokens of two heads that vary slowly over the grid, as in pictures, with some noise of their own."""
    image = interpolate(random(2, dim, coarse, coarse, seed=seed), size=(side, side), mode="bicubic")
    image = image + 0.1 * random(2, dim, side, side, seed=seed + 1)
    return scale * image.flatten(2).transpose(1, 2)[None]  # [1, 2, N, D]


@given(h=st.integers(1, 12), w=st.integers(1, 12), wanted=st.integers(1, 144), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_samples_are_the_middle_of_their_cells(h: int, w: int, wanted: int, seed: int) -> None:
    wanted = min(wanted, h * w)
    x = random(1, 2, h * w, 3, seed=seed, dtype=torch.float64)
    image = x.unflatten(2, (h, w))
    rows = min(max(round((wanted * h / w) ** 0.5), 1), h)
    columns = min(max(wanted // rows, 1), w)

    def middle(length: int, cells: int, i: int) -> list[int]:
        centre = (i + 0.5) * length / cells  # where positions are cell borders
        if length < 2 * cells:
            return [int(centre)]
        first = int((2 * (2 * i + 1) * length - 2 * cells) // (4 * cells))  # floor(centre - 1/2)
        return [first, first + 1]

    expected = [
        image[:, :, middle(h, rows, i)][:, :, :, middle(w, columns, j)].mean(dim=(2, 3))
        for i in range(rows)
        for j in range(columns)
    ]
    torch.testing.assert_close(sample_tokens(x, (h, w), wanted), torch.stack(expected, dim=2))


def test_samples_of_cells_of_four_are_their_inner_two() -> None:
    x = torch.arange(8.0)[None, None, :, None]
    assert sample_tokens(x, (1, 8), 2).flatten().tolist() == [1.5, 5.5]


@pytest.mark.parametrize("wanted", [0, 17])
def test_samples_out_of_range_are_refused(wanted: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 16 .*got {wanted}"):
        sample_tokens(random(1, 1, 16, 2), (4, 4), wanted)
    with pytest.raises(ValueError, match="a grid of 4x5 has 20 tokens, the tensor has 16"):
        sample_tokens(random(1, 1, 16, 2), (4, 5), 4)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 30.0])
def test_is_the_damped_least_squares_of_the_formula(scale: float) -> None:
    """The same, solved in float64 by singular values: Σ/(Σ² + λ) instead of Cholesky."""
    q, k, v = (smooth(12, 8, seed=s, scale=scale) for s in (1, 3, 5))
    ql, kl = (sample_tokens(x, (12, 12), 9).double() for x in (q, k))
    logits = ql @ kl.mT * 8**-0.5
    w = logits.softmax(-1)
    spread = logits.std(dim=-1, correction=0).mean(-1)
    damp = (1e-4 * spread.clamp(min=1) ** 3).clamp(max=1e-3) * w.sum(-2).amax(-1)
    gathered = scaled_dot_product_attention(ql, k.double(), v.double())
    mean = gathered.mean(-2, keepdim=True)
    left, values, right = torch.linalg.svd(w)
    z = right.mT @ torch.diag_embed(values / (values**2 + damp[..., None])) @ left.mT @ (gathered - mean)
    probes = torch.cat(probe_tokens(q), dim=2).double()
    x = scaled_dot_product_attention(probes, kl, z)
    y = scaled_dot_product_attention(probes, k.double(), v.double()) - mean
    gamma = ((x * y).sum((2, 3)) / (x * x).sum((2, 3)) / 0.8).clamp(0, 1)[..., None, None]
    expected = mean + gamma * scaled_dot_product_attention(q.double(), kl, z)
    assert relative_error(landmark_attention(q, k, v, ql.float(), kl.float(), damping=1e-4), expected) < 1e-3


def test_landmarks_everywhere_are_exact_attention() -> None:
    q, k, v = (random(2, 3, 20, 8, seed=s) for s in range(3))
    exact = scaled_dot_product_attention(q, k, v)
    assert relative_error(landmark_attention(q, k, v, q, k, damping=1e-9), exact) < 2e-3


def test_a_query_at_a_landmark_gets_its_exact_attention() -> None:
    q, k, v = (smooth(12, 8, seed=s) for s in (1, 3, 5))
    picked = torch.arange(0, 144, 9)
    landmarks = q[:, :, picked], k[:, :, picked]
    gathered = scaled_dot_product_attention(landmarks[0], k, v)
    out = scaled_dot_product_attention(q, landmarks[1], correct(*landmarks, gathered, damping=1e-7)[0])
    exact = scaled_dot_product_attention(q, k, v)
    assert relative_error(out[:, :, picked], exact[:, :, picked]) < 0.1 * relative_error(out, exact)


def test_values_that_are_all_alike_come_back() -> None:
    q, k = random(1, 2, 36, 4), random(1, 2, 36, 4, seed=1)
    v = random(1, 2, 1, 4, seed=2).expand(1, 2, 36, 4)
    out = landmark_attention(q, k, v, sample_tokens(q, (6, 6), 9), sample_tokens(k, (6, 6), 9))
    torch.testing.assert_close(out, v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0])
def test_is_far_closer_than_agents_at_the_same_number(scale: float) -> None:
    grid = (24, 24)
    q, k, v = smooth(24, 16, 1, scale), smooth(24, 16, 3, scale), smooth(24, 16, 5)
    exact = scaled_dot_product_attention(q, k, v)
    landmarks = landmark_attention(q, k, v, sample_tokens(q, grid, 36), sample_tokens(k, grid, 36))
    agents = agent_attention(q, k, v, pool_tokens(q, grid, 36))
    assert relative_error(landmarks, exact) < 0.5 * relative_error(agents, exact)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0, 100.0])
def test_sharp_heads_stay_finite_and_bounded(scale: float) -> None:
    q, k, v = (random(1, 2, 256, 8, seed=s) for s in range(3))
    q = q * scale
    out = landmark_attention(q, k, v, sample_tokens(q, (16, 16), 16), sample_tokens(k, (16, 16), 16))
    assert out.isfinite().all()
    assert out.norm() < 10 * v.norm()


def test_the_result_does_not_depend_on_padding() -> None:
    q, k, v = (smooth(12, 8, seed) for seed in range(3))
    text, padding = random(1, 2, 3, 8, seed=7), random(1, 2, 4, 8, seed=8)

    def attend(*others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (torch.cat((x, *others), dim=2) for x in (k, v))
        asked, answering = (sample_tokens(x, (12, 12), 16) for x in (q, k))
        number, context = sum(x.shape[2] for x in others), torch.cat(others, dim=2)
        masks = [torch.zeros(1, 1, 1, n + number) for n in (144, 16)]
        for mask, n in zip(masks, (144, 16), strict=True):
            mask[..., n + 3 :] = -torch.inf
        beside = Context(context, context, context)
        return landmark_attention_with_context(Tokens(q, keys, values, asked, answering, beside, *masks), 1e-5)

    padded, alone = attend(text, padding), attend(text)
    for found, wanted in zip((padded[0], padded[1][:, :, :3], padded[2]), alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def beside_text(landmarks: int, weight: float, scale: float = 1.0) -> Tokens:
    """144 tokens of a picture through landmarks, with 7 of a text beside them whose logits are up to as sharp."""
    q, k, v = (smooth(12, 8, seed, scale=scale) for seed in range(3))
    text = Context(*(random(1, 2, 7, 8, seed=seed) for seed in (7, 8, 9)))
    mask = torch.zeros(1, 1, 1, landmarks + 7)
    mask[..., :landmarks] = weight
    asked, answering = (sample_tokens(x, (12, 12), landmarks) for x in (q, k))
    return Tokens(q, torch.cat((k, text.k), dim=2), torch.cat((v, text.v), dim=2), asked, answering, text, None, mask)


def test_beside_a_context_only_the_values_of_landmarks_are_corrected() -> None:
    """The equation of `landmark_attention_with_context`, by a solver of general systems."""
    call = beside_text(16, math.log(9))
    assert call.context is not None
    assert call.landmark_mask is not None
    out, text, _ = landmark_attention_with_context(call, 1e-5)
    mask, keys, scale = call.landmark_mask, torch.cat((call.key_landmarks, call.context.k), dim=2), 8**-0.5

    def softmax(asked: Tensor) -> Tensor:
        return (scale * asked @ keys.mT + mask).softmax(dim=-1)

    def exact(asked: Tensor) -> Tensor:
        return scaled_dot_product_attention(asked, call.k, call.v)

    rows, gathered = softmax(call.query_landmarks), exact(call.query_landmarks)
    w, mean, logits = rows[..., :16], gathered.mean(dim=2, keepdim=True), scale * call.query_landmarks @ keys.mT
    damping = damp(logits[..., :16], w, 1e-5)[..., None, None] * torch.eye(16)
    plain = torch.cat((mean.expand(-1, -1, 16, -1), call.context.v), dim=2)
    z = torch.linalg.solve(w.mT @ w + damping, w.mT @ (gathered - rows @ plain))
    probes = torch.cat(probe_tokens(call.q), dim=2)
    gamma = trust(softmax(probes)[..., :16] @ z, exact(probes) - softmax(probes) @ plain)
    plain[:, :, :16] += gamma * z
    torch.testing.assert_close(out, softmax(call.q) @ plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(text, exact(call.context.q), rtol=1e-4, atol=1e-5)


def test_landmarks_weigh_as_much_as_the_tokens_they_stand_for() -> None:
    found = {}
    for weight in (0.0, math.log(9), math.log(81)):
        call = beside_text(16, weight, scale=0.7)
        exact = scaled_dot_product_attention(call.q, call.k, call.v)
        found[weight] = relative_error(landmark_attention_with_context(call, 1e-5)[0], exact)
    assert found[math.log(9)] < 0.3 * found[0.0]
    assert found[math.log(9)] < 0.6 * found[math.log(81)]


def test_every_token_as_a_landmark_is_exact_attention() -> None:
    call = beside_text(144, 0.0)
    out, _, error = landmark_attention_with_context(call, 1e-5)
    exact = scaled_dot_product_attention(call.q, call.k, call.v)
    assert relative_error(out, exact) < 0.01
    assert error.max() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(dtype: torch.dtype) -> None:
    q, k, v = (smooth(16, 8, seed=s) for s in (1, 3, 5))
    exact = scaled_dot_product_attention(q, k, v)
    outs = []
    for kind in (torch.float32, dtype):
        a, b, c = (x.to(kind) for x in (q, k, v))
        outs.append(landmark_attention(a, b, c, sample_tokens(a, (16, 16), 16), sample_tokens(b, (16, 16), 16)))
    assert outs[1].dtype == dtype
    assert relative_error(outs[1], exact) < relative_error(outs[0], exact) + 0.03


def test_autocast_leaves_the_core_in_single_precision() -> None:
    q, k, v = (smooth(12, 8, seed=s) for s in (1, 3, 5))
    landmarks = sample_tokens(q, (12, 12), 9), sample_tokens(k, (12, 12), 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = landmark_attention(q, k, v, *landmarks)
    assert relative_error(out, landmark_attention(q, k, v, *landmarks)) < 0.05


@pytest.mark.parametrize("noise", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.5, 2.0, 2.5])
def test_sharp_heads_of_noisy_tokens_are_not_amplified(noise: float, scale: float) -> None:
    """Logits with a standard deviation of 2 to 6: the correction alone would be off by twice to four times the norm."""
    grid = (32, 32)
    q, k, v = (smooth(32, 32, seed=s, coarse=8) + noise * random(1, 2, 1024, 32, seed=s + 7) for s in (1, 3, 5))
    size = scale / (q.std() * k.std()).sqrt()
    q, k = q * size, k * size
    landmarks = sample_tokens(q, grid, 64), sample_tokens(k, grid, 64)
    exact, gathered = (scaled_dot_product_attention(x, k, v) for x in (q, landmarks[0]))
    bare = scaled_dot_product_attention(q, landmarks[1], correct(*landmarks, gathered)[0])
    assert relative_error(bare, exact) > 1.3
    assert relative_error(landmark_attention(q, k, v, *landmarks), exact) < 1.1


def mixed() -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of two heads of 1,024 tokens; the first head of the second is sharp, and its tokens are noise."""
    q, k, v = (torch.cat([smooth(32, 16, seed=s + i, scale=0.7) for i in (0, 10)]) for s in (1, 3, 5))
    for x, seed in ((q, 21), (k, 22)):
        x[1, 0] = 2.5 * random(1024, 16, seed=seed)
    return q, k, v


def test_heads_that_landmarks_miss_run_exact_on_demand() -> None:
    q, k, v = mixed()
    landmarks = sample_tokens(q, (32, 32), 64), sample_tokens(k, (32, 32), 64)
    exact = scaled_dot_product_attention(q, k, v)
    plain, told = landmark_attention_and_error(q, k, v, *landmarks, 1e-5)
    assert torch.equal(plain, landmark_attention(q, k, v, *landmarks))
    out, misses = exact_where_missed(plain, told, q, k, v, 0.5)
    assert misses == 1
    assert relative_error(plain[1, 0], exact[1, 0]) > 0.5 > 0.1 > relative_error(plain[0], exact[0])
    torch.testing.assert_close(out[1, 0], exact[1, 0])
    assert all(torch.equal(out[place], plain[place]) for place in [(0, 0), (0, 1), (1, 1)])
    assert exact_where_missed(plain, told, q, k, v, 1e-6)[1] == 4
    unchanged, none = exact_where_missed(plain, told, q, k, v, 100.0)
    assert (unchanged is plain, none) == (True, 0)


def test_the_error_of_the_probes_is_that_of_the_head() -> None:
    q, k, v = mixed()
    landmarks = sample_tokens(q, (32, 32), 64), sample_tokens(k, (32, 32), 64)
    out, told = landmark_attention_and_error(q, k, v, *landmarks, 1e-5)
    exact = scaled_dot_product_attention(q, k, v)
    true = (out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    assert ((told / true) > 0.5).all()
    assert ((told / true) < 2).all()


def test_a_head_that_cannot_be_factorised_runs_exact_on_demand() -> None:
    q, k, v = (smooth(12, 8, seed=s) for s in (1, 3, 5))
    landmarks = sample_tokens(q, (12, 12), 9), sample_tokens(k, (12, 12), 9)
    landmarks[1][:, 0, 0] = torch.inf
    out, told = landmark_attention_and_error(q, k, v, *landmarks, 1e-5)
    out, misses = exact_where_missed(out, told, q, k, v, 1e9)
    assert misses == 1
    torch.testing.assert_close(out[:, 0], scaled_dot_product_attention(q, k, v)[:, 0])


def test_the_method_runs_missed_heads_exact_and_says_how_many() -> None:
    q, k, v = mixed()
    exact = scaled_dot_product_attention(q, k, v)

    def attend(**options: float) -> tuple[Tensor, int]:
        call = LayerCall(x=q.flatten(1), grid=(32, 32))
        method = AgentAttention(**options)  # type: ignore[arg-type]
        return method.build(LayerSpec("a", 0, 2, 16))(q, k, v, call), call.exact_heads

    out, heads = attend(max_head_error=0.5)
    assert heads == 1
    torch.testing.assert_close(out[1, 0], exact[1, 0])
    assert attend(max_head_error=100.0)[1] == 0
    assert attend(max_head_error=math.inf)[1] == 0
    for wrong in (0, -1.0, float("nan"), "much"):
        with pytest.raises(ValueError, match="max_head_error must be a number above 0, inf included, or None"):
            AgentAttention(max_head_error=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_given_heads_are_exact_under_any_mask(rows: int | None) -> None:
    q, k, v = mixed()
    mask = None if rows is None else random(2, rows, 1, k.shape[2], seed=3) > 0
    exact = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    plain = torch.zeros_like(q)
    out = exact_at(plain, (1,), q, k, v, mask)
    torch.testing.assert_close(out[:, 1], exact[:, 1])
    assert torch.equal(out[:, 0], plain[:, 0])


def test_a_correction_that_fits_is_taken_as_it_is() -> None:
    q, k, v = (smooth(24, 16, s, scale) for s, scale in ((1, 0.7), (3, 0.7), (5, 1.0)))
    landmarks = sample_tokens(q, (24, 24), 36), sample_tokens(k, (24, 24), 36)
    gathered = scaled_dot_product_attention(landmarks[0], k, v)
    bare = scaled_dot_product_attention(q, landmarks[1], correct(*landmarks, gathered)[0])
    torch.testing.assert_close(landmark_attention(q, k, v, *landmarks), bare, atol=1e-5, rtol=1e-4)


def test_probes_are_spread_over_the_picture() -> None:
    places = torch.cat(probe_tokens(torch.arange(1024.0)[None, None, :, None])).flatten().long()
    assert len(set((places // 128).tolist())) == 8  # in every eighth of the rows,
    assert len(set((places % 32 // 4).tolist())) >= 5  # and all over the columns
    assert torch.cat(probe_tokens(random(1, 1, 5, 2)), dim=2).shape == (1, 1, 5, 2)


def test_a_head_that_cannot_be_factorised_keeps_its_agents() -> None:
    q, k, v = (smooth(12, 8, seed=s) for s in (1, 3, 5))
    landmarks = sample_tokens(q, (12, 12), 9), sample_tokens(k, (12, 12), 9)
    gathered = scaled_dot_product_attention(landmarks[0], k, v)
    expected, _ = correct(*landmarks, gathered)
    landmarks[1][:, 0, 0] = torch.inf  # logits that are no numbers, of the first head
    found, _ = correct(*landmarks, gathered)
    torch.testing.assert_close(found[:, 0], gathered[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(found[:, 1], expected[:, 1])


def test_both_softmaxes_run_fused() -> None:
    """Tokens whose channels do not lie side by side would have PyTorch build [N, n] matrices, at twice the time."""
    q, k, v = (random(2, 64, 2, 8, seed=s).transpose(1, 2) for s in range(3))  # as projections leave them
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        landmark_attention(q, k, v, sample_tokens(q, (8, 8), 16), sample_tokens(k, (8, 8), 16))
    calls = [event.name for event in profile.events() or () if "_scaled_dot_product" in event.name]
    assert calls == ["aten::_scaled_dot_product_flash_attention_for_cpu"] * 2


def test_can_be_trained_through() -> None:
    q, k, v = (random(1, 1, 16, 4, seed=s, dtype=torch.float32).requires_grad_() for s in range(3))
    out = landmark_attention(q, k, v, sample_tokens(q, (4, 4), 4), sample_tokens(k, (4, 4), 4), damping=1e-3)
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.norm() > 0 for x in (q, k, v))


@pytest.mark.parametrize("damping", [0, -1.0, 2 * MAX_DAMPING, float("nan")])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    q = random(1, 1, 4, 2)
    with pytest.raises(ValueError, match=r"damping must be above 0 and at most 0\.001"):
        landmark_attention(q, q, q, q, q, damping=damping)
    with pytest.raises(ValueError, match="damping must be"):
        AgentAttention(agents="landmarks", damping=damping)


def test_different_landmarks_are_refused() -> None:
    q = random(1, 1, 4, 2)
    with pytest.raises(ValueError, match="same shape"):
        landmark_attention(q, q, q, q, q[:, :, :2])


@pytest.mark.parametrize("options", [{"scale_exponent": 1.0}, {"shortcut": 0.0}])
def test_options_that_would_do_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="landmarks have neither"):
        AgentAttention(agents="landmarks", **options)  # type: ignore[arg-type]


def test_agents_are_landmarks_unless_told_otherwise() -> None:
    assert AgentAttention().source == "landmarks"
    assert AgentAttention(agents="merge").source == "merge"
    assert AgentAttention(scale_exponent=1.0).source == AgentAttention(shortcut=0.0).source == "pool"


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 2, 16, 4)])
def test_two_triangular_systems_are_the_solution_of_cholesky(shape: tuple[int, ...]) -> None:
    half = random(*shape[:-1], shape[-2], seed=1)
    matrix = half @ half.mT + torch.eye(shape[-2])
    factor, wanted = torch.linalg.cholesky(matrix), random(*shape, seed=2)
    for solve in (solve_cholesky, solve_in_two):
        torch.testing.assert_close(matrix @ solve(wanted, factor), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["boolean", "-inf", "lowest of bfloat16"])
def test_masked_parts_of_a_picture_count_for_nothing(kind: str) -> None:
    q, k, v = (smooth(16, 8, seed) for seed in (1, 2, 3))
    is_kept = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    is_kept[..., 128:] = False  # the lower half
    lowest = -torch.inf if kind == "-inf" else torch.finfo(torch.bfloat16).min
    mask = is_kept if kind == "boolean" else torch.zeros(1, 1, 1, 256).masked_fill(~is_kept, lowest)
    options = {"num_agents": 64, "max_head_error": math.inf, "min_tokens": 0}
    attend = AgentAttention.from_options(options).build(LayerSpec("layer", 0, 2, 8))
    out = attend(q, k, v, LayerCall(None, (16, 16), mask=mask))
    exact = scaled_dot_product_attention(q, k, v, attn_mask=is_kept)
    assert relative_error(out[:, :, :128], exact[:, :, :128]) < 0.1
