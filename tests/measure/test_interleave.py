"""Interleaved timing: order, rounds, ratios, interruption. Never how long something takes."""

import json
import time
from contextlib import contextmanager

import pytest

from diffattn.measure.interleave import Spread, Timings, interleave, rotated


def recorder(calls, names="abc"):
    return {name: lambda name=name: calls.append(name) for name in names}


def test_every_round_runs_each_variant_once_in_rotating_order():
    calls = []
    timings = interleave(recorder(calls), rounds=4, warmup=2)
    assert calls[:6] == list("abcabc")  # warm-up
    assert ["".join(calls[i : i + 3]) for i in range(6, 18, 3)] == ["abc", "bca", "cab", "abc"]
    assert len(timings.rounds) == 4
    assert all(list(r) == ["a", "b", "c"] for r in timings.rounds)
    assert timings.reference == "a"


def test_every_variant_comes_first_in_turn():
    orders = [rotated(("a", "b", "c"), number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_contexts_surround_every_call():
    events = []

    @contextmanager
    def around(name):
        events.append(f"+{name}")
        yield
        events.append(f"-{name}")

    interleave(recorder(events, "ab"), rounds=1, warmup=1, around=around)
    assert events == ["+a", "a", "-a", "+b", "b", "-b"] * 2


def test_what_the_context_does_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += 1

    @contextmanager
    def slow(name):
        clock[0] += 10
        yield
        clock[0] += 100

    timings = interleave({"a": work}, rounds=2, warmup=0, around=slow)
    assert timings.rounds == ({"a": 1.0}, {"a": 1.0})


def test_every_finished_round_is_handed_over_and_an_interrupt_leaves_them():
    seen, calls = [], []

    def interrupted():
        calls.append(1)
        if len(calls) == 4:  # warm-up, two rounds, then the third
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": lambda: None, "b": interrupted}, rounds=5, on_round=seen.append)
    assert [len(t.rounds) for t in seen] == [1, 2]


def test_the_context_is_left_when_a_call_fails():
    left = []

    @contextmanager
    def around(name):
        try:
            yield
        finally:
            left.append(name)

    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1, warmup=0, around=around)
    assert left == ["a"]


def test_goes_on_from_finished_rounds():
    calls = []
    before = [{"a": 1.0, "b": 2.0}]
    timings = interleave(recorder(calls, "ab"), rounds=3, warmup=0, finished=before)
    assert "".join(calls) == "baab"  # the second and the third round
    assert timings.rounds[0] == before[0]
    calls.clear()
    interleave(recorder(calls, "ab"), rounds=1, finished=before)
    assert not calls


def test_a_deadline_ends_after_the_first_round():
    timings = interleave({"a": lambda: None}, rounds=9, deadline=time.monotonic() - 1)
    assert len(timings.rounds) == 1


def test_figures():
    rounds = (
        {"ref": 4.0, "x": 2.0, "floor": 1.0},
        {"ref": 8.0, "x": 5.0, "floor": 2.0},
        {"ref": 2.0, "x": 1.5, "floor": 0.5},
    )
    timings = Timings("ref", rounds, {"x": 3.5})
    assert timings.seconds("ref") == Spread(4.0, 3.0, 6.0)
    assert timings.time_ratio("x") == Spread(0.625, 0.5625, 0.6875)
    assert timings.speedup("x") == 1.6
    assert timings.share_of_saving("x", "floor") == pytest.approx((1 - 0.625) / (1 - 0.25))
    data = json.loads(json.dumps(timings.to_dict()))
    assert data["rounds"] == 3
    assert data["variants"]["x"]["seconds_per_round"] == [2.0, 5.0, 1.5]
    assert data["variants"]["x"]["peak_mib"] == 3.5
    assert "peak_mib" not in data["variants"]["ref"]


def test_no_share_of_a_saving_that_does_not_show():
    rounds = ({"ref": 1.0, "x": 0.5, "floor": 0.9}, {"ref": 1.0, "x": 0.5, "floor": 1.2})
    assert Timings("ref", rounds).share_of_saving("x", "floor") is None


def test_spread_of_one_value():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": {}, "rounds": 1}, "no variants"),
        ({"variants": {"a": print}, "rounds": 0}, "got 0"),
        ({"variants": {"a": print}, "rounds": 1, "finished": [{"b": 1.0}]}, "finished rounds"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        interleave(**arguments)
