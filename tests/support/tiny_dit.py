"""Tiny DiTs with random weights, and the numeric fixtures of the published ones."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffattn.models import DiT
from support.reference import FOLDER, Case

CONFIG: dict[str, Any] = dict(
    sample_size=16, patch_size=2, hidden_size=24, num_layers=2, num_heads=3, num_classes=5, attention="mediator"
)


def tiny_dit(**overrides: Any) -> DiT:
    """Random everywhere, so that no gate is closed; 8x8 tokens, mediators 4, 16 and 64."""
    torch.manual_seed(0)
    model = DiT(**(CONFIG | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if "bias" in name else 0.2)
    return model


def inputs(height: int = 16, width: int = 16, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 6


def run(model: Any, *args: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*args).sample


def dit_cases(*prefixes: str) -> pytest.MarkDecorator:
    """Parametrises a test's `case` over all fixtures of mediators, SiT and DiT whose names start so."""
    entries = json.loads((FOLDER / "dit.json").read_text())["cases"]
    found = []
    for e in entries:
        if e["name"].startswith(prefixes):
            shared = load_file(FOLDER / e["weights_from"]) if "weights_from" in e else {}
            tensors = {key: x for key, x in shared.items() if key.startswith("w.")} | load_file(FOLDER / e["file"])
            found.append(Case(e["name"], e["params"], tensors, e["tolerance"]))
    assert found, prefixes
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def weights(case: Case) -> dict[str, Tensor]:
    """A fixture's weights by their official names."""
    return {key.removeprefix("w."): x for key, x in case.tensors.items() if key.startswith("w.")}
