"""Speed-ups of few pictures: an interval, or no figure."""

import pytest

from diffattn.app.jobs.kept import renamed, without
from diffattn.app.jobs.speed_up import SpeedUp


def test_student_s_interval_of_the_ratios() -> None:
    found = SpeedUp.of([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert found is not None
    # logs: 0.6931, 0.7885, 0.5878, 0.6931; their mean 0.6906, standard deviation 0.0820, t(3) 3.182
    assert (found.value, found.low, found.high) == pytest.approx((1.995, 1.751, 2.273), abs=2e-3)
    assert found.shown
    assert str(found).startswith("1.99× (1.75–2.27)") or str(found).startswith("2.00× (1.75–2.27)")


def test_where_it_spans_1_no_difference_is_shown() -> None:
    found = SpeedUp.of([1.0, 1.5, 1.0], [1.1, 1.0, 1.2])
    assert found is not None
    assert found.low < 1 < found.high
    assert not found.shown
    assert str(found).startswith("no difference shown (")
    assert SpeedUp.of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).shown is False  # type: ignore[union-attr]


def test_too_few_pictures_give_no_figure() -> None:
    assert SpeedUp.of([1.0, 2.0], [2.0, 1.0]) is None


def test_a_visitors_runs_are_renamed_and_deleted() -> None:
    kept = [{"title": "a"}, {"title": "b"}]
    assert without(kept, ["a", "of the page"]) == [{"title": "b"}]
    assert renamed(kept, ["a", "of the page"], " mine ") == [{"title": "mine"}, {"title": "b"}]
    refused = {"x": (["a", "b"], "2 are ticked"), "b": (["a"], "have a run"), " ": (["a"], "1 to 80")}
    for name, (titles, says) in (refused | {"x" * 81: (["a"], "1 to 80")}).items():
        with pytest.raises(ValueError, match=says):
            renamed(kept, titles, name)
