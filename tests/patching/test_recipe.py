"""Tuned recipes: settings by layer and noise level, and the refusal of all that is not such a recipe."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny

import diffattn

AGENTS: dict[str, Any] = {"num_agents": 4, "agent_ratio": None, "max_head_error": 100.0, "min_tokens": 0}
SCHEDULE = {"0.5": "few", "0.0": "exact"}
LONG = {str(i / 100): "few" for i in range(65)}  # a noise level more than a schedule may have
HALVES = {bound: LONG[bound] for bound in [*LONG][:40]}, SCHEDULE | {bound: LONG[bound] for bound in [*LONG][40:]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return tiny.pipeline("sd", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def layers(pipe: DiffusionPipeline) -> list[str]:
    with diffattn.patch(pipe, **AGENTS) as handle:
        return [x.name for x in handle.report().layers if x.left_alone is None]


def recipe(layers: list[str], schedule: Any = SCHEDULE, **own: Any) -> dict[str, Any]:
    """The same schedule for every layer, but for those in `own`, by the index of the layer as `at_0`."""
    settings = {
        "few": {"method": "agent", "options": AGENTS},
        "more": {"method": "agent", "options": AGENTS | {"num_agents": 9}},
    }
    entries = {name: own.get(f"at_{i}", schedule) for i, name in enumerate(layers)}
    return {"diffattn_recipe": 1, "settings": settings, "layers": copy.deepcopy(entries)}


@pytest.mark.slow
def test_one_schedule_for_all_layers_is_what_patch_makes_of_it(
    pipe: DiffusionPipeline, layers: list[str], tmp_path: Path
) -> None:
    with diffattn.patch(pipe, schedule={0.5: {}, 0.0: "exact"}, **AGENTS):
        expected = tiny.run(pipe)
    exact = tiny.run(pipe)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(layers)))
    for given in (recipe(layers), file, str(file)):
        with diffattn.patch(pipe, recipe=given):
            assert torch.equal(tiny.run(pipe), expected)
    assert not torch.equal(exact, expected)
    assert torch.equal(tiny.run(pipe), exact)


def test_every_layer_follows_its_own_schedule(pipe: DiffusionPipeline, layers: list[str]) -> None:
    own = {"at_0": {"0.7": "more", "0.3": "few", "0.0": "exact"}, "at_1": {"0.0": "more"}}
    with diffattn.patch(pipe, recipe=recipe(layers, {"0.0": "exact"}, **own)) as handle:
        tiny.run(pipe, num_inference_steps=6)
        report = {x.name: x for x in handle.report().layers}
        trace = handle.trace()
    levels = [call["noise_level"] for call in trace]
    agents = {name: value for name, value in AGENTS.items() if value is not None}
    assert report[layers[0]].accelerated == sum(u >= 0.3 for u in levels)
    assert report[layers[1]].accelerated == len(levels)
    assert {report[name].left_alone for name in layers[2:]} == {"exact by recipe"}
    for call in trace:
        first = 9 if call["noise_level"] >= 0.7 else 4
        options = call["options"]
        assert options[layers[0]] == ("exact" if call["noise_level"] < 0.3 else agents | {"num_agents": first})
        assert options[layers[1]]["num_agents"] == 9


def test_a_single_layer_is_what_patch_makes_of_it(pipe: DiffusionPipeline, layers: list[str]) -> None:
    with diffattn.patch(pipe, layers=[layers[2]], schedule={0.4: {}, 0.0: "exact"}, **AGENTS):
        expected = tiny.run(pipe)
    given = recipe(layers, {"0.0": "exact"}, at_2={"0.4": "few", "0": "exact"})
    with diffattn.patch(pipe, recipe=given):
        assert torch.equal(tiny.run(pipe), expected)
    with diffattn.patch(pipe, recipe=recipe(layers, {"0.4": "few", "0": "exact"}), layers=[layers[2]]):
        assert torch.equal(tiny.run(pipe), expected)


def test_samples_at_different_noise_levels_have_settings_of_their_own(layers: list[str]) -> None:
    unet: Any = tiny.unet().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, tiny.WIDTH, generator=generator, dtype=torch.float64)
    given = recipe(layers, {"0.5": "few", "0.0": "more"}, at_0={"0.6": "exact", "0.0": "few"})

    def alone(i: int, t: int) -> torch.Tensor:
        with diffattn.patch(unet, recipe=given):
            return unet(x[i : i + 1], t, text[i : i + 1]).sample

    with torch.no_grad(), diffattn.patch(unet, recipe=given):
        together = unet(x, torch.tensor([900, 100]), text).sample
    with torch.no_grad():
        apart = torch.cat([alone(0, 900), alone(1, 100)])
    assert torch.allclose(together, apart, atol=1e-9)


def test_a_controlnet_beside_the_model_runs_exact(
    make_pipeline: Callable[[str], DiffusionPipeline], layers: list[str]
) -> None:
    with diffattn.patch(make_pipeline("controlnet"), recipe=recipe(layers)) as handle:
        report = {x.name: x for x in handle.report().layers}
    assert {x.left_alone for name, x in report.items() if name in layers} == {None}
    control = [x for name, x in report.items() if name.startswith("controlnet.") and x.left_alone != "cross-attention"]
    assert control
    assert {x.left_alone for x in control} == {"exact by recipe"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffattn_recipe": 2}, "recipe has version 2; this diffattn reads version 1"),
        ({"diffattn_recipe": True}, "recipe has version True"),
        ({"diffattn_recipe": "1"}, "recipe has version '1'"),
        ({"preset": "fast"}, "unknown recipe key preset; allowed: diffattn_recipe, settings, layers"),
        ({"settings": None}, "settings must be a mapping with names as keys, got None"),
        ({"layers": {}}, "layers must be a mapping with names as keys"),
        ({"layers": {"mid": {"0.0": "exact"}}}, "exact in every layer"),
        ({"layers": {"mid": {"0.0": "many"}}}, "layer 'mid' of a recipe: unknown setting 'many'; allowed: few, more"),
        ({"layers": {"mid": {"0.0": {"num_agents": 4}}}}, "unknown setting"),
        ({"layers": {"mid": "few"}}, "layer 'mid' of a recipe needs a mapping"),
        ({"layers": {"mid": {"0.5": "few"}}}, "needs an entry at 0.0"),
        ({"layers": {"mid": {"0.0": "few", "1.5": "few"}}}, "below 1, got '1.5'"),
        ({"layers": {"mid": {"0.0": "few", "high": "few"}}}, "noise levels from 0 to 1, got 'high'"),
        ({"layers": {"mid": LONG}}, "a schedule has at most 64 entries, got 65"),
        (
            {"layers": {"mid": HALVES[0], "up": HALVES[1]}},
            "the layers of a recipe may have at most 64 noise levels, got 65",
        ),
        ({"layers": {str(i): SCHEDULE for i in range(2000)}}, "a recipe may have at most 1024 layers, got 2000"),
        ({"layers": {"mid": ["x" * 200]}}, r"a mapping from noise level to setting, got \['x{40,60}\.\.\.x{40,60}'\]$"),
        ({"x" * 200: 1}, "unknown recipe key x{100}; allowed"),
        ({"settings": {"few": {"method": "linear", "options": {}}}}, "unknown method: 'linear'"),
        ({"settings": {"few": {"method": "agent"}}}, "setting 'few' of a recipe must have a method and options"),
        ({"settings": {"few": {"method": "agent", "options": 3}}}, "options of setting 'few'"),
        ({"settings": {"few": {"method": "agent", "options": {"agent": 3}}}}, "unknown option agent"),
        ({"settings": {"few": {"method": "agent", "options": {"num_agents": 0}}}}, "num_agents must be 1 or more"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_no_recipe_is_refused(
    pipe: DiffusionPipeline, layers: list[str], change: dict[str, Any], message: str
) -> None:
    processors = dict(pipe.unet.attn_processors)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        diffattn.patch(pipe, recipe=recipe(layers) | change)
    assert processors == pipe.unet.attn_processors  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": []}, r"a recipe's preset must be a name, got \[\]"),
        ({"preset": {"fast": 1}}, "a recipe's preset must be a name"),
        ({"method": ["agent"]}, "a recipe's method must be a name"),
        ({"method": 3}, "a recipe's method must be a name, got 3"),
        ({"layers": 5}, "a recipe's layers must be a list of names, got 5"),
        ({"layers": [["mid"]]}, "a recipe's layers must be a list of names"),
        ({"layers": [None]}, "a recipe's layers must be a list of names"),
        ({"layers": ["mid"] * 2000}, "a recipe may have at most 1024 layers, got 2000"),
        ({"schedule": {str(i / 100): {} for i in range(65)}}, "a schedule has at most 64 entries, got 65"),
        (
            {"schedule": {"kind": "latent_change", "entries": [{}] * 65, "thresholds": [1]}},
            "at most 64 entries, got 65",
        ),
        ({"schedule": {"x" * 200: {}}}, r"got 'x{10,20}\.\.\.x{10,20}'$"),
        ({"options": [1]}, "a recipe's options must be a mapping"),
        ({"options": {"num_agents": []}}, "num_agents must be"),
        ({"schedule": 5}, "schedule must be"),
        (["agent"] * 10_000, r"a recipe must be a mapping .*got \['agent', .*\.\.\.\]$"),
        ({"diffattn_recipe": 1, "settings": {"a": {"method": [], "options": {}}}}, r"unknown method: \[\]"),
    ],
    ids=str,
)
def test_what_a_recipe_by_hand_cannot_hold_is_refused(pipe: DiffusionPipeline, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffattn.patch(pipe, recipe=given)


def test_a_recipe_by_hand_may_hold_what_patch_takes(pipe: DiffusionPipeline, layers: list[str]) -> None:
    for chosen in (None, layers[:1], set(layers[:1]), lambda layer: layer.name == layers[0]):
        with diffattn.patch(pipe, recipe={"method": "agent", "preset": None, "options": AGENTS, "layers": chosen}):
            pass


@pytest.mark.parametrize("beside", [{"preset": "fast"}, {"schedule": {0.0: {}}}, {"num_agents": 3}])
def test_what_would_change_a_tuned_recipe_is_refused(
    pipe: DiffusionPipeline, layers: list[str], beside: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="a tuned recipe is complete"):
        diffattn.patch(pipe, recipe=recipe(layers), **beside)


def test_the_recipe_of_another_model_is_refused(
    make_pipeline: Callable[[str], DiffusionPipeline], pipe: DiffusionPipeline, layers: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"another model: the model lacks .*attn1; the recipe does not .* and 1 more$"):
        diffattn.patch(make_pipeline("sdxl"), recipe=recipe(layers))
    with pytest.raises(ValueError, match=f"another model: the recipe does not know {layers[-1]}$"):
        diffattn.patch(pipe, recipe=recipe(layers[:-1]))
    with pytest.raises(ValueError, match=r"another model: the model lacks extra$"):
        diffattn.patch(pipe, recipe=recipe([*layers, "extra"]))
