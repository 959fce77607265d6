"""Options by noise level, and by the change of the latents."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.reference import FOLDER, Case
from torch import Tensor

from diffattn import LatentChangeSchedule, NoiseSchedule
from diffattn.models import DiT
from diffattn.sampling import EulerMaruyamaScheduler
from diffattn.schedules import constant, read_schedule

THREE = {0.7: {"num_agents": 16}, 0.3: {"num_agents": 64}, 0.0: "exact"}


@pytest.mark.parametrize(
    ("level", "phase"),
    [(1.0, 0), (0.7, 0), (0.6999, 1), (0.3, 1), (0.2999, 2), (0.0, 2), (1.5, 0), (-0.1, 2)],
)
def test_the_highest_bound_not_above_the_level_applies(level: float, phase: int) -> None:
    assert NoiseSchedule(THREE).phase_at(level) == phase


def test_entries_come_from_noise_to_data_in_whatever_order_they_are_given() -> None:
    schedule = NoiseSchedule({0.0: "exact", 0.7: {"num_agents": 16}, 0.3: {"num_agents": 64}})
    assert schedule.bounds == (0.7, 0.3, 0.0)
    assert schedule.phases == ({"num_agents": 16}, {"num_agents": 64}, None)


def test_a_batch_in_one_phase_is_a_number_and_in_several_a_tuple() -> None:
    schedule = NoiseSchedule(THREE)
    schedule.start(3)
    schedule.observe(None, [0.9])
    assert schedule.phase() == 0
    schedule.observe(None, [0.5, 0.4, 0.35])
    assert schedule.phase() == 1
    schedule.observe(None, [0.9, 0.5, 0.0])
    assert schedule.phase() == (0, 1, 2)


def test_a_new_run_starts_at_the_first_phase() -> None:
    schedule = NoiseSchedule(THREE)
    schedule.observe(None, [0.1])
    schedule.start(1)
    assert schedule.phase() == 0


def test_reachable_phases_are_those_of_the_levels() -> None:
    assert NoiseSchedule(THREE).reachable([0.5, 0.31, 0.1]) == {1, 2}
    assert NoiseSchedule(THREE).reachable([]) == set()


def test_bounds_may_be_text_as_in_json() -> None:
    schedule = NoiseSchedule({"0.5": {"num_agents": 4}, "0": "exact"})
    assert schedule.bounds == (0.5, 0.0)
    assert schedule.phase_at(0.6) == 0


def test_goes_through_json_and_back() -> None:
    schedule = NoiseSchedule(THREE)
    again = NoiseSchedule(json.loads(json.dumps(schedule.to_dict())))
    assert (again.bounds, again.phases) == (schedule.bounds, schedule.phases)


def test_later_changes_of_the_entries_do_not_reach_it() -> None:
    options = {"num_agents": 4}
    schedule = NoiseSchedule({0.0: options})
    options["num_agents"] = 99
    assert schedule.phases == ({"num_agents": 4},)


def test_constant_has_one_phase_at_every_level() -> None:
    assert constant().phases == ({},)
    assert constant().reachable([0.0, 0.5, 1.0]) == {0}


@given(st.dictionaries(st.floats(0, 1, exclude_max=True), st.builds(dict), min_size=1), st.floats(0, 1))
def test_phases_never_decrease_as_noise_falls(entries: dict[float, dict[str, Any]], level: float) -> None:
    schedule = NoiseSchedule(entries | {0.0: "exact"})
    phase = schedule.phase_at(level)
    assert level >= schedule.bounds[phase]
    assert phase == 0 or level < schedule.bounds[phase - 1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "needs an entry at 0.0"),
        ({0.5: {}}, r"needs an entry at 0.0, got bounds \[0.5\]"),
        ({0.0: {}, 1.0: {}}, "below 1, got 1.0"),
        ({0.0: {}, -0.1: {}}, "at least 0.*got -0.1"),
        ({0.0: {}, float("nan"): {}}, "got nan"),
        ({0.0: {}, float("inf"): {}}, "got inf"),
        ({0.0: {}, "high": {}}, "got 'high'"),
        ({i / 100: {} for i in range(65)}, "a schedule has at most 64 entries, got 65"),
        ({0.0: {}, None: {}}, "got None"),
        ({0.0: "exactly"}, "options or 'exact', got 'exactly'"),
        ({0.0: 5}, "options or 'exact', got 5"),
        ({0.0: None}, "options or 'exact', got None"),
    ],
)
def test_entries_that_make_no_schedule_are_refused(entries: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(entries)


# By the change of the latents.

FEW_TO_MANY = [{"num_mediators": 4}, {"num_mediators": 16}, {"num_mediators": 64}]


def changing(*deltas: float, start: float = 0.0) -> list[Tensor]:
    """States [1, 1, 2, 2] whose mean absolute changes are these; the change of the first step goes before."""
    states = [torch.full((1, 1, 2, 2), start)] * 2
    for delta in deltas:
        states.append(states[-1] + delta)
    return states


def follow(schedule: LatentChangeSchedule, states: list[Tensor]) -> list[int | tuple[int, ...]]:
    """The phases of a run, one step per state."""
    schedule.start(len(states[0]))
    phases = []
    for k, state in enumerate(states):
        schedule.observe(state, [1 - k / len(states)])
        phases.append(schedule.phase())
    return phases


def test_moves_on_when_the_change_falls_below_a_share_of_the_first_ones() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=2)
    states = changing(9, 11, 8.1, 7.9, 9, 3.9, 20)  # Δ₀ = 10
    assert follow(schedule, states) == [0, 0, 0, 0, 0, 1, 1, 2, 2]


def test_can_move_on_twice_at_once_and_never_within_the_first_changes() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=3)
    assert follow(schedule, changing(14.9, 15, 0.1, 0.1)) == [0, 0, 0, 0, 0, 2]


def test_a_state_that_does_not_change_at_all_does_not_move_on() -> None:
    assert follow(LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4]), changing(0, 0, 0, 0, 0)) == [0] * 7


@pytest.mark.parametrize(("distance", "expected"), [("l1", 2.0), ("l2", 5.0)])
def test_distances(distance: str, expected: float) -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], distance=distance)
    seen = []
    for level, state in ((0.9, 9.0), (0.8, 0.0), (0.7, torch.tensor([-1.0, 3.0]))):
        schedule.observe(torch.zeros(1, 1, 1, 2) + state, [level])
        seen.append(schedule.change)
    assert seen == [None, None, expected]


def test_calls_at_one_noise_level_are_one_step_and_the_later_state_counts() -> None:
    """As Heun's method evaluates: a guess at the next level, then the state there."""
    schedule, plain = (LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=2) for _ in range(2))
    states = changing(9, 11, 8.1, 7.9, 9, 3.9, 20)
    expected = follow(plain, states)
    schedule.start(1)
    for k, state in enumerate(states):
        level = [1 - k / len(states)]
        if k:
            schedule.observe(state + torch.rand(1) - 0.5, level)
        schedule.observe(state, level)
        assert schedule.phase() == expected[k]


def test_a_guess_that_moves_on_is_taken_back_with_its_state() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=1)
    *before, last = changing(10, 9)
    follow(schedule, before)
    schedule.observe(before[-1] + 1, [0.01])
    assert schedule.phase() == 2
    schedule.observe(last, [0.01])
    assert (schedule.phase(), schedule.change) == (0, 9.0)


def samples() -> list[Tensor]:
    """Seven states of three samples, which slow down at different times."""
    runs = (changing(10, 10, 9, 9, 9), changing(10, 10, 7, 5, 3), changing(1, 1, 0.9, 0.3, 0.3))
    return [torch.cat(states) for states in zip(*runs, strict=True)]


def test_every_sample_decides_for_itself_or_the_mean_decides_for_all() -> None:
    own = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=2, per_sample=True)
    assert follow(own, samples()) == [0, 0, 0, 0, (0, 1, 0), (0, 1, 2), (0, 2, 2)]
    assert own.change == pytest.approx([9, 3, 0.3])
    batch = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=2)
    assert follow(batch, samples()) == [0, 0, 0, 0, 0, 1, 1]
    assert batch.change == pytest.approx(4.1)


@pytest.mark.parametrize("per_sample", [False, True])
def test_copies_of_the_batch_for_guidance_change_nothing(per_sample: bool) -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=2, per_sample=per_sample)
    alone = follow(copy.deepcopy(schedule), samples())
    twice = [p if isinstance(p, int) else p * 2 for p in alone]
    assert follow(copy.deepcopy(schedule), [torch.cat([x, x]) for x in samples()]) == twice
    # Guidance in a part of the run only, and a ControlNet that is called with half the batch before.
    schedule.start(3)
    for k, x in enumerate(samples()):
        schedule.observe(x, [1 - k / 7])
        assert schedule.phase() == alone[k]
        if k % 3:
            schedule.observe(torch.cat([x, x]), [1 - k / 7])
            assert schedule.phase() == twice[k]


def test_another_size_begins_anew() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=1)
    follow(schedule, changing(10, 1))
    assert schedule.phase() == 2
    schedule.observe(torch.zeros(1, 1, 3, 3), [0.01])
    assert (schedule.phase(), schedule.change) == (0, None)


def test_a_state_that_is_changed_in_place_afterwards_is_remembered_as_it_was() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4])
    state = torch.zeros(1, 1, 2, 2)
    for level in (0.9, 0.8, 0.7):
        schedule.observe(state, [level])
        state += 2
    assert schedule.change == 2


def test_a_new_run_of_latent_changes_starts_at_the_first_phase() -> None:
    schedule = LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4], first=1)
    first = follow(schedule, changing(10, 1))
    assert follow(schedule, changing(10, 1)) == first == [0, 0, 0, 2]
    assert schedule.reachable([0.1]) == {0, 1, 2}


@pytest.mark.parametrize(
    "schedule",
    [
        LatentChangeSchedule(FEW_TO_MANY, [0.8, 0.4]),
        LatentChangeSchedule([{}, "exact"], [0.5], first=5, distance="l2", per_sample=True),
        NoiseSchedule(THREE),
    ],
)
def test_any_schedule_goes_through_json_and_back(schedule: LatentChangeSchedule | NoiseSchedule) -> None:
    again = read_schedule(json.loads(json.dumps(schedule.to_dict())))
    assert type(again) is type(schedule)
    assert (again.to_dict(), again.phases) == (schedule.to_dict(), schedule.phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entries": 5}, "entries must be a list of options or 'exact', got 5"),
        ({"entries": {"num_mediators": 4}}, "entries must be a list"),
        ({"entries": ["exactly", {}, {}]}, "options or 'exact', got 'exactly'"),
        ({"entries": [{}, {}]}, "one more entry than thresholds, got 2 entries and 2 thresholds"),
        ({"entries": [{}], "thresholds": []}, "got 1 entries and 0 thresholds"),
        ({"thresholds": [0.4, 0.8]}, r"falling numbers above 0, got \[0.4, 0.8\]"),
        ({"thresholds": [0.8, 0.0]}, "falling numbers above 0"),
        ({"thresholds": [float("nan"), 0.1]}, "falling numbers above 0"),
        ({"thresholds": ["a", "b"]}, "falling numbers above 0"),
        ({"thresholds": 0.5}, "falling numbers above 0, got 0.5"),
        ({"first": 0}, "first must be a whole number, 1 or more, got 0"),
        ({"first": 2.0}, "first must be .* got 2.0"),
        ({"distance": "l3"}, "distance must be 'l1' or 'l2', got 'l3'"),
        ({"per_sample": "yes"}, "per_sample must be True or False, got 'yes'"),
        ({"kind": "latents"}, "kind of schedule must be 'latent_change', got 'latents'"),
        ({"last": 3}, "unknown key last .*allowed: entries, thresholds, first, distance, per_sample"),
    ],
    ids=str,
)
def test_what_makes_no_schedule_of_latent_changes_is_refused(arguments: dict[str, Any], message: str) -> None:
    good = {"kind": "latent_change", "entries": FEW_TO_MANY, "thresholds": [0.8, 0.4]}
    with pytest.raises(ValueError, match=message):
        read_schedule(good | arguments)


def test_a_schedule_of_latent_changes_needs_entries_and_thresholds() -> None:
    with pytest.raises(ValueError, match="needs entries, thresholds"):
        read_schedule({"kind": "latent_change"})


@pytest.mark.parametrize("pair", ["pair_a", "pair_b"])
def test_switches_as_the_published_implementation(pair: str) -> None:
    """Three checkpoints, each with its own number of mediators, and the noise that was drawn."""
    entry = json.loads((FOLDER / "switch.json").read_text())["cases"][0]
    p, expected = entry["params"], entry["params"]["pairs"][pair]
    case = Case(entry["name"], p, load_file(FOLDER / entry["file"]), entry["tolerance"])

    def model(i: int) -> DiT:
        weights = {k.removeprefix(f"w.model{i}."): x for k, x in case.tensors.items() if k.startswith(f"w.model{i}.")}
        return DiT.from_official(weights, num_heads=p["models"][0]["num_heads"])

    models = [model(i) for i in (1, 2, 3)]
    ratios = (expected["switch_ratio1"], expected["switch_ratio2"])
    schedule = LatentChangeSchedule([{}, {}, {}], ratios, first=p["first_several_num"], distance="l2")
    scheduler = EulerMaruyamaScheduler()
    scheduler.set_timesteps(p["num_steps"])
    x, noise = case["in.z"], [*case["in.noise"], torch.zeros_like(case["in.z"])]
    phases, changes = [], []
    for timestep, z in zip(scheduler.timesteps, noise, strict=True):
        level = timestep.item() / 1000
        schedule.observe(x, [level])
        phases.append(schedule.phase())
        changes.append(schedule.change)
        with torch.no_grad():
            v = models[phases[-1]](x, torch.tensor([1 - level]), case["in.y"]).sample
        x = scheduler.step(-v, timestep, x, noise=z).prev_sample  # type: ignore[union-attr]
    assert [phase + 1 for phase in phases] == [*expected["model_at_step"], expected["model_at_last_step"]]
    assert changes[:2] == [None, None]
    torch.testing.assert_close(torch.tensor(changes[2:]), torch.tensor(expected["distances"]), **case.tolerance)
    case.assert_close(x, f"out.{pair}.final")
