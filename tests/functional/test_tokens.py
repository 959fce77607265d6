"""Pooling over the grid and merging by similarity: the published numbers, and properties for every grid."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import Case, cases
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils._python_dispatch import TorchDispatchMode

from diffattn.functional import Matching, match_tokens, merge_tokens, pool_tokens, unmerge_tokens
from diffattn.functional.tokens import merged_slots, pooled_grid

quick = settings(deadline=None, max_examples=100)
sides = st.integers(1, 23)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Pooling.


@given(h=sides, w=sides, data=st.data())
@quick
def test_pooling_is_adaptive_average_pooling_on_any_grid(h: int, w: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, h * w))
    rows = min(max(round((num * h / w) ** 0.5), 1), h)
    columns = min(max(num // rows, 1), w)
    x = rand(2, 3, h * w, 4, seed=num)
    expected = torch.stack(
        [adaptive_avg_pool2d(x[:, i].mT.unflatten(2, (h, w)), (rows, columns)).flatten(2).mT for i in range(3)], dim=1
    )
    torch.testing.assert_close(pool_tokens(x, (h, w), num), expected)


@pytest.mark.parametrize(
    ("grid", "num", "pooled"),
    [
        ((8, 8), 16, (4, 4)),
        ((8, 8), 49, (7, 7)),
        ((64, 64), 64, (8, 8)),
        ((64, 128), 64, (6, 10)),
        ((13, 17), 20, (4, 5)),
        ((5, 7), 35, (5, 7)),
        ((9, 9), 1, (1, 1)),
        ((1, 12), 5, (1, 5)),
    ],
)
def test_pooled_grid_follows_the_aspect_ratio(grid: tuple[int, int], num: int, pooled: tuple[int, int]) -> None:
    assert pooled_grid(grid, num) == pooled


@given(side=st.integers(1, 16), data=st.data())
@quick
def test_a_perfect_square_on_a_square_grid_stays_square(side: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(1, side))
    assert pooled_grid((side, side), root**2) == (root, root)


def test_pooling_to_all_tokens_is_the_identity_and_to_one_is_the_mean() -> None:
    x = rand(1, 2, 35, 4)
    torch.testing.assert_close(pool_tokens(x, (5, 7), 35), x)
    torch.testing.assert_close(pool_tokens(x, (5, 7), 1), x.mean(2, keepdim=True))


def test_pooling_keeps_rows_and_columns_apart() -> None:
    image = torch.zeros(4, 6)
    image[:2, 3:] = 1
    pooled = pool_tokens(image.reshape(1, 1, 24, 1), (4, 6), 4)
    assert pooled.flatten().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("num", [0, -1, 17])
def test_impossible_numbers_of_pooled_tokens_are_refused(num: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 16.*got {num}"):
        pool_tokens(rand(1, 1, 16, 2), (4, 4), num)


def test_a_grid_that_is_not_that_of_the_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="4x4 has 16 tokens, the tensor has 15"):
        pool_tokens(rand(1, 1, 15, 2), (4, 4), 4)
    with pytest.raises(ValueError, match="4x4 has 16 tokens, the tensor has 15"):
        match_tokens(rand(1, 15, 2), (4, 4), (2, 2))


# Merging: the published numbers.


def matching_of(case: Case) -> Matching:
    p = case.params
    seed = p["generator_seed"]
    generator = None if p["no_rand"] else torch.Generator().manual_seed(seed)
    return match_tokens(case["in.metric"], (p["h"], p["w"]), (p["sy"], p["sx"]), generator)


@cases("agentsd_merge_", "tomesd_merge_")
def test_merging_matches_the_published_implementation(case: Case) -> None:
    matching, r = matching_of(case), case.params["r"]
    assert matching.destinations.shape == (case.params["num_dst"],)
    merged = merge_tokens(case["in.x"], matching, r)
    case.assert_close(merged, "out.merged")
    case.assert_close(unmerge_tokens(merged, matching, r), "out.unmerged")
    case.assert_close(unmerge_tokens(case["in.y_merged"], matching, r), "out.unmerge_y")
    assert torch.equal(merged_slots(matching, r), case["aux.token_to_slot"])


@cases("agentsd_merge_")
def test_agents_come_from_the_same_matching(case: Case) -> None:
    p, matching = case.params, matching_of(case)
    agents = merge_tokens(case["in.x"], matching, p["agent_r"])
    assert agents.shape[1] == p["N"] - p["agent_r_clamped"]
    if p["agent_tokens"] is not None:
        case.assert_close(agents, "out.agent")


@cases("agentsd_merge_8x8_s2_rand")
def test_random_destinations_are_the_published_ones(case: Case) -> None:
    p = case.params
    offset = case["aux.rand_idx"][..., 0]
    rows = torch.arange(p["h"] // p["sy"])[:, None] * p["sy"] + offset // p["sx"]
    columns = torch.arange(p["w"] // p["sx"])[None] * p["sx"] + offset % p["sx"]
    expected = (rows * p["w"] + columns).flatten().sort().values
    assert torch.equal(matching_of(case).destinations, expected)


# Merging: properties.

grids = st.tuples(st.integers(2, 13), st.integers(2, 13))


@st.composite
def matchings(draw: st.DrawFn) -> tuple[tuple[int, int], Matching, int]:
    """A grid, a matching on it and a number of merged tokens, now and then out of range."""
    h, w = draw(grids)
    stride = (draw(st.integers(1, h)), draw(st.integers(2, w)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99))) if draw(st.booleans()) else None
    matching = match_tokens(rand(2, h * w, 5, seed=h * w), (h, w), stride, generator)
    return (h, w), matching, draw(st.integers(-2, h * w + 2))


@pytest.mark.slow
@given(matchings())
@quick
def test_merged_tokens_are_the_means_of_those_they_hold(drawn: tuple[tuple[int, int], Matching, int]) -> None:
    (h, w), matching, r = drawn
    x = rand(2, h * w, 3, seed=1)
    merged = merge_tokens(x, matching, r)
    slots = merged_slots(matching, r)
    assert merged.shape == (2, h * w - min(max(r, 0), matching.max_merged), 3)
    expected = torch.stack(
        [torch.stack([x[b, slots[b] == i].mean(0) for i in range(merged.shape[1])]) for b in range(2)]
    )
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(unmerge_tokens(merged, matching, r), expected.gather(1, slots[..., None].expand_as(x)))


@pytest.mark.slow
@given(matchings())
@quick
def test_constant_tokens_stay_constant_and_positions_are_kept(drawn: tuple[tuple[int, int], Matching, int]) -> None:
    (h, w), matching, r = drawn
    constant = torch.full((2, h * w, 3), 7.0)
    torch.testing.assert_close(unmerge_tokens(merge_tokens(constant, matching, r), matching, r), constant)
    every = torch.cat([matching.sources, matching.destinations.expand(2, -1)], dim=1).sort(1).values
    assert torch.equal(every, torch.arange(h * w).expand(2, -1))  # each token is a source or a destination, once


@pytest.mark.slow
@given(matchings())
@quick
def test_merging_nothing_is_the_identity(drawn: tuple[tuple[int, int], Matching, int]) -> None:
    (h, w), matching, _ = drawn
    x = rand(2, h * w, 3)
    assert torch.equal(unmerge_tokens(merge_tokens(x, matching, 0), matching, 0), x)


@pytest.mark.slow
@given(matchings())
@quick
def test_heads_share_one_matching(drawn: tuple[tuple[int, int], Matching, int]) -> None:
    (h, w), matching, r = drawn
    x = rand(2, 3, h * w, 4)  # [B, H, N, D]
    merged = merge_tokens(x, matching, r)
    assert torch.equal(merged, torch.stack([merge_tokens(x[:, i], matching, r) for i in range(3)], dim=1))
    back = unmerge_tokens(merged, matching, r)
    assert torch.equal(back, torch.stack([unmerge_tokens(merged[:, i], matching, r) for i in range(3)], dim=1))


@pytest.mark.slow
@given(grid=grids, seed=st.integers(0, 1000), data=st.data())
@quick
def test_random_destinations_are_one_per_full_cell(grid: tuple[int, int], seed: int, data: st.DataObject) -> None:
    h, w = grid
    sy, sx = data.draw(st.integers(1, h)), data.draw(st.integers(2, w))
    matching = match_tokens(rand(1, h * w, 4), grid, (sy, sx), torch.Generator().manual_seed(seed))
    rows, columns = matching.destinations // w, matching.destinations % w
    cells = {(int(r) // sy, int(c) // sx) for r, c in zip(rows, columns, strict=True)}
    assert len(matching.destinations) == len(cells)
    assert cells == {(i, j) for i in range(h // sy) for j in range(w // sx)}


def test_random_destinations_follow_the_generator() -> None:
    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return match_tokens(rand(1, 256, 4), (16, 16), (2, 2), generator).destinations.tolist()

    assert drawn(3) == drawn(3) != drawn(4)


def test_each_source_goes_to_its_most_similar_destination_best_pairs_first() -> None:
    metric = rand(2, 48, 6)
    matching = match_tokens(metric, (6, 8), (2, 2))
    similarity = torch.cosine_similarity(
        metric.gather(1, matching.sources[..., None].expand(-1, -1, 6))[:, :, None],
        metric[:, matching.destinations][:, None],
        dim=-1,
    )
    assert torch.equal(matching.targets, similarity.argmax(-1))
    best = similarity.amax(-1)
    assert (best[:, 1:] <= best[:, :-1] + 1e-6).all()


def test_merging_commutes_with_a_linear_layer() -> None:
    x, weight = rand(1, 36, 5), rand(7, 5, seed=1)
    matching = match_tokens(x, (6, 6), (3, 3))
    torch.testing.assert_close(merge_tokens(x @ weight.T, matching, 20), merge_tokens(x, matching, 20) @ weight.T)


dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@dtypes
def test_an_all_zero_destination_captures_no_merges(dtype: torch.dtype) -> None:
    metric = rand(1, 64, 8).abs().to(dtype)
    metric[:, 18] = 0  # row 2, column 2: the destination of its cell
    matching = match_tokens(metric, (8, 8), (2, 2))
    assert matching.destinations[5] == 18
    assert (matching.targets != 5).all()


@dtypes
def test_an_all_zero_source_merges_last(dtype: torch.dtype) -> None:
    metric = rand(1, 64, 8).abs().to(dtype)
    metric[:, 9] = 0
    assert match_tokens(metric, (8, 8), (2, 2)).sources[0, -1] == 9


@dtypes
def test_an_all_zero_picture_merges_without_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64, 8, dtype=dtype)
    matching = match_tokens(x, (8, 8), (2, 2))
    assert torch.equal(unmerge_tokens(merge_tokens(x, matching, 40), matching, 40), x)


def test_tiny_tokens_in_half_precision_are_told_apart() -> None:
    metric = rand(1, 64, 8) * 1e-3
    targets = []
    for x in (metric.half(), metric.half().double()):
        matching = match_tokens(x, (8, 8), (2, 2))
        targets.append(matching.targets.gather(1, matching.sources.argsort(1)))
    assert (targets[0] == targets[1]).float().mean() > 0.9


@pytest.mark.parametrize("stride", [(1, 1), (0, 2), (2, 0), (9, 2), (2, 9), (-2, 2)])
def test_strides_without_a_full_cell_of_several_tokens_are_refused(stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"8x8 grid, got {stride[0]}x{stride[1]}"):
        match_tokens(rand(1, 64, 4), (8, 8), stride)


def test_gradients_pass_through_merging() -> None:
    matching = match_tokens(rand(1, 16, 4), (4, 4), (2, 2))
    x = rand(1, 2, 16, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unmerge_tokens(merge_tokens(x, matching, 8), matching, 8), x)


class Asked(TorchDispatchMode):
    """Counts what waits for a device: shapes that depend on values, and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._to_copy)
        return func(*args, **(kwargs or {}))


def test_destinations_at_corners_need_no_answer_of_the_device() -> None:
    metric = rand(2, 36, 5)
    with Asked() as asked:
        found = match_tokens(metric, (6, 6), (3, 3))
    assert asked.waits == 0
    assert found.destinations.tolist() == [0, 3, 18, 21]
    with Asked() as asked:
        match_tokens(metric.double(), (6, 6), (3, 3))
    assert asked.waits > 0  # it counts
