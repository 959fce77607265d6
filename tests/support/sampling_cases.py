"""The numeric fixtures of SiT's paths and samplers, and tiny pipelines with random weights."""

import json
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffattn.models import DiT
from diffattn.sampling import SiTPipeline
from support.reference import FOLDER, Case
from support.tiny_dit import tiny_dit, weights

ENTRIES = {entry["name"]: entry for entry in json.loads((FOLDER / "sampling.json").read_text())["cases"]}

NAMES = {0: "cat, tabby", 1: "dog", 2: "crane, bird", 3: "crane, machine", 4: "fish"}


def sampling_case(name: str) -> Case:
    """One fixture, with the weights it shares with others."""
    entry = ENTRIES[name]
    shared = load_file(FOLDER / entry["weights_from"]) if "weights_from" in entry else {}
    tensors = {key: x for key, x in shared.items() if key.startswith("w.")} | load_file(FOLDER / entry["file"])
    return Case(name, entry["params"], tensors, entry["tolerance"])


def variants(*names: str) -> pytest.MarkDecorator:
    """Parametrises a test over (fixture, name of the variant) of the Euler kind."""
    found = [(name, v) for name in names for v in ENTRIES[name]["params"]["variants"] if not v.startswith("heun")]
    return pytest.mark.parametrize(("name", "variant"), found)


def official(case: Case) -> DiT:
    """The model of a fixture."""
    return DiT.from_official(weights(case), num_heads=case.params["model"]["num_heads"])


def tiny_pipeline(scheduler: Any = None, vae: Any = None, **overrides: Any) -> Any:
    """A `SiTPipeline` of random weights, 16x16 latents, 5 classes; without a VAE unless one is given."""
    pipe = SiTPipeline(tiny_dit(**overrides), scheduler or FlowMatchEulerDiscreteScheduler(), vae, NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe
