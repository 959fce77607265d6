"""Applies to all tests of patching."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_thresholds_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(tmp_path / "none.json"))
