"""The search for thresholds: costs, errors, budgets, and a recipe that patches."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.tiny_dit import tiny_dit

from diffattn import patch
from diffattn.measure.flops import forward_gflops
from diffattn.sampling import SiTPipeline
from diffattn.tuning.mediators import SearchConfig, ThresholdSearch, best_within, thresholds_recipe

CONFIG = SearchConfig(samples=3, batch=2, steps=8, ratios=(1.1, 0.8), first=2)


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    pipe = SiTPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler(shift=1))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def search(pipe) -> ThresholdSearch:
    return ThresholdSearch(pipe, CONFIG)


@pytest.fixture(scope="module")
def candidates(search) -> list:
    return search.candidates()


@pytest.mark.slow
def test_constants_and_every_falling_choice_are_tried(search, candidates) -> None:
    assert [c.num_mediators for c in candidates] == [4, 16, 64, None, None, None]
    assert [c.thresholds for c in candidates[3:]] == [(1.1, 1.1), (1.1, 0.8), (0.8, 0.8)]
    assert len(candidates) == search.num_candidates


@pytest.mark.slow
def test_costs_are_counted_per_picture(pipe, candidates) -> None:
    for candidate in candidates[:3]:
        assert candidate.gflops == pytest.approx(8 * forward_gflops(pipe.transformer, candidate.num_mediators))
        assert candidate.calls[candidate.num_mediators] == 1
    for candidate in candidates[3:]:
        assert candidates[0].gflops <= candidate.gflops <= candidates[2].gflops
        assert sum(candidate.calls.values()) == pytest.approx(1)


def test_the_largest_number_is_what_errors_refer_to(candidates) -> None:
    assert candidates[2].error == 0
    assert candidates[0].error > 0


@pytest.mark.slow
def test_guidance_counts_both_passes(pipe) -> None:
    guided = ThresholdSearch(pipe, SearchConfig(samples=2, batch=2, steps=2, guidance=3.0, ratios=(1.0,)))
    assert guided.candidates()[0].gflops == pytest.approx(4 * forward_gflops(pipe.transformer, 4))


def test_the_best_is_the_nearest_within_the_budget(candidates) -> None:
    most = candidates[2].gflops
    assert best_within(candidates, most) is candidates[2]
    cheap = best_within(candidates, 0.999 * most)
    assert cheap.gflops < most
    assert all(c.error >= cheap.error for c in candidates if c.gflops <= 0.999 * most)
    with pytest.raises(ValueError, match=r"no schedule costs .* the cheapest"):
        best_within(candidates, 0.01 * most)


def test_recipes_survive_json_and_patch(pipe, search, candidates) -> None:
    for candidate in (candidates[0], candidates[4]):
        recipe = json.loads(json.dumps(thresholds_recipe(candidate, search, "tiny", 0.9)))
        with patch(pipe, recipe=recipe):
            pipe([0], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))


def test_the_model_is_left_as_it_was(pipe, candidates) -> None:
    assert pipe.transformer.num_mediators == 64
    assert not pipe.transformer._forward_pre_hooks


def test_what_cannot_be_searched(pipe) -> None:
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        SearchConfig(samples=0)
    with pytest.raises(ValueError, match="ratios must be numbers above 0"):
        SearchConfig(ratios=(0.5, -1.0))
    with pytest.raises(ValueError, match="ratios must be numbers above 0"):
        SearchConfig(ratios=(float("nan"),))
    with pytest.raises(ValueError, match="distance must be 'l1' or 'l2', got 'l3'"):
        SearchConfig(distance="l3")
    for seed in (-1, 10**23, 2**63 - 16):  # each of the 32 pictures has its own
        with pytest.raises(ValueError, match=rf"seed must be at least 0 and below 2\^63, got {seed}"):
            SearchConfig(seed=seed)
    for guidance in (-3.0, float("nan")):
        with pytest.raises(ValueError, match=f"guidance must be 0 or more, got {guidance}"):
            SearchConfig(guidance=guidance)
    single = SiTPipeline(tiny_dit(mediators=(4,)), FlowMatchEulerDiscreteScheduler(shift=1))
    with pytest.raises(ValueError, match="two numbers of mediators"):
        ThresholdSearch(single, CONFIG)
