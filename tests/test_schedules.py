"""Options by noise level."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffattn import NoiseSchedule
from diffattn.schedules import constant

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
        ({0.0: {}, None: {}}, "got None"),
        ({0.0: "exactly"}, "options or 'exact', got 'exactly'"),
        ({0.0: 5}, "options or 'exact', got 5"),
        ({0.0: None}, "options or 'exact', got None"),
    ],
)
def test_entries_that_make_no_schedule_are_refused(entries: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(entries)
