"""Counting launches with the profiler, and the clock; never how long something takes."""

import pytest
import torch

from diffattn.measure.clock import mark, seconds_between
from diffattn.measure.launches import OPERATIONS, count_launches

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [1, 5])
def test_operations_are_counted_once_each_without_those_inside(number: int) -> None:
    x = torch.ones(8, 8)

    def call() -> None:
        for _ in range(number):
            torch.nn.functional.linear(x, x)  # which calls others

    found = count_launches(call, CPU)
    assert found.number == number
    assert found.what == OPERATIONS
    assert found.seconds > 0
    assert found.to_dict() == {"number": number, "seconds": found.seconds, "what": OPERATIONS}


def test_the_first_call_is_not_counted() -> None:
    calls = []

    def call() -> None:
        for _ in range(1 if calls else 10):
            torch.ones(2).add(1)
        calls.append(1)

    assert count_launches(call, CPU).number == 2
    assert len(calls) == 2


def test_the_clock_runs_forward() -> None:
    begin = mark(CPU)
    assert seconds_between(begin, mark(CPU)) >= 0
    assert seconds_between(1.0, 3.5) == 2.5
