"""Markdown tables; those in a terminal are tested with the benchmark that prints them."""

import pytest

from diffattn.tables import markdown_table


def test_markdown_tables() -> None:
    text = markdown_table(("name", "x"), [("a", "1"), ("b", "")])
    assert text.splitlines() == ["| name | x |", "| --- | --- |", "| a | 1 |", "| b |  |"]


def test_pipes_and_line_ends_in_cells_leave_the_table_whole() -> None:
    text = markdown_table(("error",), [("a | b\nc",)])
    assert text.splitlines()[2:] == [r"| a \| b c |"]


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        markdown_table(("a", "b"), [("1",)])
