"""A tuned recipe against the fixed presets on emoji-sd, on prompts and seeds that it was not tuned on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import diffattn
from diffattn.cli.tune import _rival_line
from diffattn.drawing.request import Request
from diffattn.tuning.config import TuneConfig
from diffattn.tuning.runs import PipelineRuns, relative_error
from diffattn.tuning.search import Search
from diffattn.tuning.settings import settings_of

CALIBRATION = ("crab", "red apple", "key")
SIDE = 256  # pixels: smaller than the model's own, since latents are compared, not pictures
HELD_OUT = ("mushroom", "hot dog", "sailboat", "crown")
CONFIG = TuneConfig(max_error=0.1, steps=4, guidance=2.5, bands=2, probed=1, cost="flops", checks=8)
PRESETS = diffattn.METHODS["agent"].presets  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = diffattn.load_demo("emoji-sd")
    found.set_progress_bar_config(disable=True)
    return found


def runs_of(pipe: Any, prompts: tuple[str, ...], seed: int) -> PipelineRuns:
    drawing = {"steps": CONFIG.steps, "guidance": CONFIG.guidance, "width": SIDE, "height": SIDE}
    request = Request(model="emoji-sd", prompt="", seed=seed, **drawing)  # type: ignore[arg-type]
    return PipelineRuns(pipe, prompts, request)


def mean_error(runs: PipelineRuns, exact: list[torch.Tensor], patched: Mapping[str, Any]) -> float:
    with runs.patched(patched):
        return sum(relative_error(runs.latents(i), x) for i, x in enumerate(exact)) / len(exact)


def test_at_the_cost_of_every_preset_a_tuned_recipe_is_nearer(pipe: Any) -> None:
    """Costs are counted, so that the outcome does not depend on the machine."""
    runs, others = runs_of(pipe, CALIBRATION, 0), runs_of(pipe, HELD_OUT, 100)
    exact, compared = [others.latents(i) for i in range(len(HELD_OUT))], 0
    with runs.watched():
        search = Search(runs, settings_of(), CONFIG)
        for name in PRESETS:
            preset = {"method": "agent", "preset": name, "options": {"min_tokens": 1024}}
            fixed = mean_error(others, exact, preset)
            if fixed == 0:  # accelerates nothing at this size
                continue
            cost = search.speedup(preset)
            search.config = replace(CONFIG, max_error=None, min_speedup=cost)
            best = search.best()
            recipe = search.recipe(best.route, best.rungs)
            assert search.speedup(recipe) >= cost
            assert mean_error(others, exact, recipe) < fixed, name
            compared += 1
    assert compared >= 3


def test_a_preset_that_is_nearer_than_every_recipe_does_not_cost_the_recipe(pipe: Any) -> None:
    coarse = [("agent", {"agents": "pool", "num_agents": 1, "agent_ratio": None, "min_tokens": 1024})]
    tuned = diffattn.tune(
        pipe, CALIBRATION[:1], max_error=1.0, candidates=coarse, steps=2, guidance=2.5, bands=1, cost="flops", checks=2,
        presets=True, width=SIDE, height=SIDE,
    )  # fmt: skip
    assert tuned.recipe["layers"]
    rival = next(r for r in tuned.rivals if r.preset == "agent/balanced")
    assert 0 < rival.error < min(check.error for check in tuned.checks)
    assert (rival.tuned, rival.tuned_speedup, rival.is_beaten) == (None, None, False)
    assert "NOT beaten, no recipe tried is as close" in _rival_line(rival)
