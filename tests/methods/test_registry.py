"""What every method says about itself, which one a model takes, and that no other file knows a method by name."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny
from support.tiny_dit import tiny_dit
from torch import Tensor

import diffattn
from diffattn import DiffAttnWarning, LayerSpec
from diffattn.app.jobs.choices import accelerations
from diffattn.capabilities import capabilities
from diffattn.drawing.draw import prepare
from diffattn.drawing.request import Request
from diffattn.methods import METHODS, method_for
from diffattn.methods.base import AttentionFn, AttentionMethod, LayerCall, Preset
from diffattn.patching.default_method import default_method
from diffattn.patching.plan import DEFAULT_PRESET
from diffattn.preflight.run import PreflightRun
from diffattn.tuning.settings import settings_of

ROOT = Path(diffattn.__file__).parent
Make = Callable[[str], DiffusionPipeline]


@pytest.fixture(params=diffattn.METHODS)
def method(request: pytest.FixtureRequest) -> type[AttentionMethod]:
    return diffattn.METHODS[request.param]


def test_it_is_registered_under_its_own_name(method: type[AttentionMethod]) -> None:
    assert diffattn.METHODS[method.name] is method


def test_its_presets_are_options_that_it_takes(method: type[AttentionMethod]) -> None:
    assert DEFAULT_PRESET in method.presets
    for preset in method.presets.values():
        phases = diffattn.NoiseSchedule(preset.schedule).phases if preset.schedule else ({},)
        for options in phases:
            assert isinstance(method.from_options({**preset.options, **(options or {})}), method)


def test_an_unknown_option_is_refused_with_those_there_are(method: type[AttentionMethod]) -> None:
    with pytest.raises(ValueError, match=f"unknown option bogus of method '{method.name}'; allowed: ") as error:
        method.from_options({"bogus": 1})
    assert all(option.name in str(error.value) for option in fields(method))  # type: ignore[arg-type]


def test_its_defaults_are_json_types(method: type[AttentionMethod]) -> None:
    json.dumps({option.name: option.default for option in fields(method)}, allow_nan=False)  # type: ignore[arg-type]


def test_tuning_can_use_what_it_suggests(method: type[AttentionMethod]) -> None:
    found = method.candidates()
    assert len({method.from_options(options) for options in found}) == len(found)
    assert not (found and method.tuned_by_change)
    json.dumps(list(found), allow_nan=False)


def test_its_size_is_the_one_that_was_asked_for(method: type[AttentionMethod]) -> None:
    if method.size_name is None:
        assert method.from_options({}).size(4096) is None
        with pytest.raises(ValueError, match=f"method '{method.name}' has no size to choose, got 16"):
            method.options_for_size(16)
        return
    asked = method.from_options(method.options_for_size(16))
    assert [asked.size(tokens) for tokens in (64, 4096)] == [16, 16]
    assert asked.out_of_range([], 4) is None  # not an option that the user gave


# Which method a model takes.


def layer(kind: str = "softmax", cross: bool = False) -> LayerSpec:
    return LayerSpec("x", level=0, num_heads=1, head_dim=8, is_cross_attention=cross, kind=kind)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([layer()], "agent"),
        ([layer("mediator")], "mediator"),
        ([layer(), layer("mediator"), layer()], "mediator"),  # what was learned comes first
        ([layer(), layer("mediator", cross=True)], "agent"),
        ([layer("agent")], "agent"),  # none suits: the first, whose error names the kind
        ([], "agent"),
    ],
)
def test_the_method_that_fits_some_layers(layers: list[LayerSpec], expected: str) -> None:
    assert method_for(layers) == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("sd", "agent"), ("dit", "agent"), ("sit", "agent"), ("sit-mediators", "mediator")]
)
def test_the_same_method_everywhere(kind: str, expected: str, make_pipeline: Make) -> None:
    pipe = make_pipeline(kind)
    assert default_method(pipe) == expected
    for target in (pipe, pipe.components.get("unet") or pipe.components["transformer"]):
        with diffattn.patch(target) as patch:
            assert patch.report().method == expected
            assert patch.report().layers_patched > 0
        assert PreflightRun(target, rounds=1).method == expected
    prompt = "" if kind == "sd" else "1"
    ready, found = prepare(pipe, Request(model="tiny", prompt=prompt, guidance=1.0))
    assert found is not None
    assert (ready.method, ready.preset) == (expected, DEFAULT_PRESET)


def test_one_line_draws_with_mediators(make_pipeline: Make) -> None:
    pipe = make_pipeline("sit-mediators")
    exact = tiny.run(pipe)
    with diffattn.patch(pipe) as patch:
        assert not torch.equal(tiny.run(pipe), exact)
    assert patch.report().layers_accelerated == 2
    assert torch.equal(tiny.run(pipe), exact)


def test_the_method_fits_the_layers_that_were_asked_for() -> None:
    model = tiny_dit(attention=["mediator", "softmax"])
    first, second = "blocks.0.attn", "blocks.1.attn"
    for arguments, expected in (
        ({}, "mediator"),
        ({"layers": [second]}, "agent"),
        ({"layers": lambda spec: spec.name == first}, "mediator"),
        ({"recipe": {"layers": [second]}}, "agent"),
        ({"recipe": {"layers": [second], "method": None}}, "agent"),
        ({"recipe": {"layers": [first], "method": "mediator"}}, "mediator"),
    ):
        with diffattn.patch(model, **arguments) as patch:  # type: ignore[arg-type]
            assert patch.report().method == expected, arguments


def test_options_of_another_method_are_refused_by_the_one_that_fits(make_pipeline: Make) -> None:
    pipe = make_pipeline("sit-mediators")
    with pytest.raises(ValueError, match="unknown option num_agents of method 'mediator'; allowed: num_mediators"):
        diffattn.patch(pipe, num_agents=16)
    with pytest.raises(ValueError, match="unknown preset of method 'mediator': 'paper'; allowed: balanced, fast"):
        diffattn.patch(pipe, preset="paper")


@pytest.mark.parametrize(("agents", "most"), [("pool", 31), ("landmarks", 31), ("merge", 63)])
def test_too_many_agents_for_the_size_run_exact_and_say_what_is_allowed(
    agents: str, most: int, make_pipeline: Make
) -> None:
    pipe = make_pipeline("sit")
    with (
        diffattn.patch(pipe, agents=agents, num_agents=64, min_tokens=0),
        pytest.warns(DiffAttnWarning, match=f"num_agents=64 is not below the 64 tokens .*; allowed: 1 to {most}$"),
    ):
        tiny.run(pipe)
    with diffattn.patch(pipe, agents=agents, num_agents=most, agent_ratio=None, min_tokens=0) as patch:
        tiny.run(pipe)
    assert patch.report().layers_accelerated == 2


# A new method is one file and one line of the registry.


@dataclass(frozen=True)
class Mean(AttentionMethod):
    """Every token gets the mean of all values."""

    strength: float = 1.0

    name: ClassVar[str] = "mean"
    presets: ClassVar[Mapping[str, Preset]] = {"balanced": Preset(), "half": Preset({"strength": 0.5})}

    @classmethod
    def candidates(cls) -> list[dict[str, Any]]:
        return [{"strength": 0.25}]

    def supports(self, layer: LayerSpec) -> bool:
        return True

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return None

    def build(self, layer: LayerSpec) -> AttentionFn:
        def attention(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
            return self.strength * v.mean(2, keepdim=True).expand_as(v)

        return attention


@pytest.fixture
def _with_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Mean.name, Mean)


@pytest.mark.usefixtures("_with_mean")
def test_a_registered_method_is_known_everywhere(make_pipeline: Make) -> None:
    assert {"mean/balanced", "mean/half"} <= set(accelerations())
    assert capabilities()["methods"]["mean"]["options"] == {"strength": 1.0}
    assert settings_of()[-1].name == "mean-1"
    pipe = make_pipeline("sd")
    assert default_method(pipe) == "agent"  # the first in the registry that suits
    with diffattn.patch(pipe, "mean", preset="half") as patch:
        tiny.run(pipe)
    assert patch.report().layers_accelerated == 7
    assert PreflightRun(pipe, method="mean", rounds=1).method == "mean"


def test_the_first_method_that_suits_is_the_default(monkeypatch: pytest.MonkeyPatch, make_pipeline: Make) -> None:
    pipe = make_pipeline("sd")
    others = [name for name, kind in METHODS.items() if kind.suits([layer()]) and name != "agent"]
    assert others == ["inline", "keys", "tiles"]
    for before, after in zip(("agent", *others), others, strict=False):
        monkeypatch.setattr(METHODS[before], "suits", classmethod(lambda cls, layers: False))
        assert default_method(pipe) == after
    monkeypatch.setattr(METHODS[others[-1]], "suits", classmethod(lambda cls, layers: False))
    assert default_method(pipe) == "agent"  # none suits


# No other file knows a method by name.

BY_NAME = {
    "methods": "the methods",
    "models": "kinds of layers that a model can have, not methods",
    "training": "likewise, in the configuration",
    "benchmarks/mediator_subjects.py": "likewise",
    "cli/bench.py": "a command's name",
}
"""Files and folders that hold the name of a method as a text, and what it means there."""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the string constants of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_other_file_knows_a_method_by_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        if not path.relative_to(ROOT).as_posix().startswith(tuple(BY_NAME))
        for line, text in texts(path)
        if text in METHODS
    ]
    assert found == []
