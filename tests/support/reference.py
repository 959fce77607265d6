"""Reads the numeric fixtures in `tests/fixtures`: tensors computed by the published implementations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Case:
    """One fixture: its parameters, and its tensors by name (`in.`, `w.`, `out.`, `aux.`)."""

    name: str
    params: dict[str, Any]
    tensors: dict[str, Tensor]
    tolerance: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def assert_close(self, actual: Tensor, name: str) -> None:
        torch.testing.assert_close(actual, self.tensors[name], **self.tolerance)


def cases(*prefixes: str) -> pytest.MarkDecorator:
    """Parametrises a test's `case` over all fixtures of the agent family whose names start so."""
    entries = json.loads((FOLDER / "agent.json").read_text())["cases"]
    found = [
        Case(e["name"], e["params"], load_file(FOLDER / e["file"]), e["tolerance"])
        for e in entries
        if e["name"].startswith(prefixes)
    ]
    assert found, prefixes
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)
