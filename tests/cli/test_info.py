"""The tables of `diffattn info`, as printed on a terminal of 80 columns."""

from dataclasses import fields

import pytest
from support.commands import call

from diffattn.cli.common import stdout
from diffattn.methods import METHODS


def test_a_narrow_terminal_cuts_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdout, "_width", 80)
    monkeypatch.setattr(stdout, "_height", 40)
    done = call("info")
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("│")) <= 80  # titles may be longer
    words = done.stdout.split()
    assert {field.name for method in METHODS.values() for field in fields(method)} <= set(words)  # type: ignore[arg-type]
    assert not [word for word in words if word.endswith("…") and "=" not in word]
