"""Tuning: calibration, the order of giving up, both budgets, and what is promised."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from support import tiny
from support.denoisers import CASES
from support.tiny_dit import tiny_dit

import diffattn
from diffattn.files import write_json
from diffattn.sampling import SiTPipeline
from diffattn.tuning import calibrate as tune_calibrate
from diffattn.tuning.config import CannotTune
from diffattn.tuning.ladder import Option, climb, hull, ladder, tighten
from diffattn.tuning.probe import Log, measure_costs, probing
from diffattn.tuning.runs import band_at, bands_of, relative_error
from diffattn.tuning.search import Search
from diffattn.tuning.settings import recipe_of, routes_of, settings_of
from diffattn.tuning.tune import Tuned, workload

PROMPTS = ["a cat", "two dogs", "red"]
FEW = {"num_agents": 4, "agent_ratio": None, "max_head_error": 10.0, "min_tokens": 0}
CANDIDATES = [("agent", FEW | {"agents": kind, "num_agents": n}) for kind in ("landmarks", "pool") for n in (4, 16)]
SMALL: Any = dict(candidates=CANDIDATES, steps=4, bands=2, cost="flops", guidance=3.0)


# The order in which exactness is given up.


def test_the_hull_leaves_out_what_a_mixture_of_others_beats() -> None:
    cheap, middle, dear = Option(0, 1.0, 0.1), Option(1, 2.0, 0.4), Option(2, 3.0, 0.5)
    assert hull([dear, middle, cheap]) == [cheap, dear]  # squares: .01, .16, .25; the chord at 2 is at .13
    assert hull([dear, Option(1, 2.0, 0.3), cheap]) == [cheap, Option(1, 2.0, 0.3), dear]
    assert hull([Option(0, 1.0, 0.3), Option(1, 2.0, 0.1)]) == [Option(1, 2.0, 0.1)]  # better and cheaper
    assert hull([Option(0, 0.0, 0.1), Option(1, -1.0, 0.0), Option(2, 1.0, math.inf), Option(3, 1.0, math.nan)]) == []
    assert hull([Option(0, 1.0, 0.3), Option(1, 1.0, 0.2)]) == [Option(1, 1.0, 0.2)]


def test_the_ladder_takes_the_smallest_price_first_and_adds_up() -> None:
    places = {
        ("a", 0): [Option(0, 1.0, 0.1), Option(1, 2.0, 0.4)],
        ("b", 0): [Option(0, 2.0, 0.2)],
        ("c", 0): [Option(0, 1.0, math.inf)],
    }
    rungs = ladder(places)
    assert [(r.place, r.setting) for r in rungs] == [(("a", 0), 0), (("b", 0), 0), (("a", 0), 1)]
    assert [r.saving for r in rungs] == pytest.approx([1, 3, 4])
    assert [r.error for r in rungs] == pytest.approx([0.1, math.hypot(0.1, 0.2), math.hypot(0.4, 0.2)])


def test_a_tightened_ladder_puts_off_what_a_saving_does_not_need() -> None:
    places = {
        ("a", 0): [Option(0, 1.0, 0.1), Option(1, 4.0, 0.9)],
        ("b", 0): [Option(0, 4.0, 0.3)],
        ("c", 0): [Option(0, 0.5, 0.05)],
    }
    rungs = ladder(places)
    assert [(r.place[0], r.saving) for r in rungs] == [("c", 0.5), ("a", 1.5), ("b", 5.5), ("a", 8.5)]
    tight = tighten(rungs, 4.2)
    assert [(r.place[0], r.saving) for r in tight] == [("c", 0.5), ("b", 4.5), ("a", 5.5), ("a", 8.5)]
    assert [r.error for r in tight] == pytest.approx([0.05, math.hypot(0.05, 0.3), rungs[2].error, rungs[3].error])
    later = tighten(rungs, 7.0)  # the second step of a place needs the first
    assert [(r.place[0], r.setting) for r in later] == [("a", 0), ("b", 0), ("a", 1), ("c", 0)]
    unreached = tighten(rungs, 9.0)
    assert [(r.place, r.setting) for r in unreached] == [(r.place, r.setting) for r in rungs]
    assert [r.error for r in unreached] == pytest.approx([r.error for r in rungs])
    assert tighten([], 1.0) == []


def test_climbing_finds_the_last_position_within_the_budget() -> None:
    expected = [0.01 * k for k in range(1, 101)]
    for limit in (1, 2, 37, 99, 100):
        low, high, tries = 0, len(expected) + 1, 0
        while low + 1 < high:
            k = climb(expected, 0.01 * limit * 1.5 + 1e-9, low, high, scale=1.5)
            assert low < k < high
            low, high, tries = (k, high, tries + 1) if k <= limit else (low, k, tries + 1)
        assert low == limit
        assert tries <= 40


def test_bands_hold_about_as_many_calls_each() -> None:
    levels = [0.95, 0.9, 0.8, 0.6, 0.55, 0.3, 0.2, 0.1]
    bounds = bands_of(levels, 4)
    assert bounds == (0.85, 0.575, 0.25, 0.0)
    assert [band_at(bounds, u) for u in levels] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bands_of(levels, 1) == (0.0,)
    assert bands_of([0.5, 0.5, 0.5], 3) == (0.0,)
    assert len(bands_of([1.0, 0.5], 8)) == 2
    close = bands_of([0.50000002, 0.50000001], 2)
    assert 0.50000001 < close[0] < 0.50000002


# Settings and recipes.


def test_settings_are_named_by_method_and_adjacent_bands_are_one_entry() -> None:
    settings = settings_of(CANDIDATES)
    assert [s.name for s in settings] == ["agent-1", "agent-2", "agent-3", "agent-4"]
    choice = {"x": [1, 1, None], "y": [None, None, None], "z": [3, None, 3]}
    recipe = recipe_of(choice, (0.6, 0.3, 0.0), settings)
    assert recipe["layers"] == {
        "x": {"0.3": "agent-2", "0.0": "exact"},
        "y": {"0.0": "exact"},
        "z": {"0.6": "agent-4", "0.3": "exact", "0.0": "agent-4"},
    }
    assert list(recipe["settings"]) == ["agent-2", "agent-4"]
    assert {s.method.name for s in settings_of()} >= {"agent"}


def test_every_family_of_settings_has_a_route_beside_the_mixed_one() -> None:
    settings = settings_of([*CANDIDATES, ("keys", {"factor": 2})])
    assert routes_of(settings) == {
        "mixed": [0, 1, 2, 3, 4],
        "agent/landmarks": [0, 1],
        "agent/pool": [2, 3],
        "keys": [4],
    }
    assert routes_of(settings[:2]) == {"mixed": [0, 1]}


# On a tiny Stable Diffusion.


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return tiny.pipeline("sd", tmp_path_factory.mktemp("tokenizer"))


def latents(pipe: Any, seed: int, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="latent").images


@pytest.fixture(scope="module")
def calls() -> list[int]:
    return [0]


@pytest.fixture(scope="module")
def tuned(pipe: DiffusionPipeline, calls: list[int]) -> Tuned:
    def count() -> None:
        calls[0] += 1

    return diffattn.tune(pipe, PROMPTS, max_error=0.01, on_call=count, **SMALL)


def test_a_probe_sees_every_layer_and_changes_nothing(pipe: DiffusionPipeline) -> None:
    exact, log, settings = latents(pipe, 0, "a cat"), Log(), settings_of(CANDIDATES)
    with probing(pipe, settings, log) as patch:
        assert relative_error(latents(pipe, 0, "a cat"), exact) < 1e-5
        assert patch.report().layers_accelerated == 7
    assert len(log.kinds) == 7
    assert len(log.samples) == 2  # layers of 256 tokens, and of 64
    layer = next(iter(log.kinds))
    errors = [log.error(layer, 0, i) for i in range(4)]
    assert errors[1] < errors[0]  # 16 landmarks follow exact attention more closely than 4
    assert all(0 < e < 2 for e in errors)
    assert log.error(layer, 1, 0) == math.inf
    costs = measure_costs(log, settings, "flops", 1, torch.device("cpu"))
    assert costs.saving(layer, 0) > costs.saving(layer, 1) > 0
    assert costs.exact[layer] == pytest.approx(2 * 2 * 2 * 256**2 * 16 / 1e9)  # two products, batch of two
    timed = measure_costs(log, settings, "time", 2, torch.device("cpu"))
    assert min(*timed.exact.values(), *timed.settings.values()) > 0


MIXED: list[tuple[str, dict[str, Any]]] = [
    ("agent", FEW),
    ("inline", {"max_head_error": 1e9, "min_tokens": 0}),
    ("keys", {"factor": 2, "min_tokens": 0}),
    ("tiles", {"tiles": 2, "min_tokens": 0}),
]


def test_methods_are_mixed_per_layer_and_noise_level(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    settings, log = settings_of(MIXED), Log()
    with probing(pipe, settings, log):
        latents(pipe, 0, "a cat")
    layers = list(log.kinds)
    assert all(0 < log.error(layer, 0, i) < math.inf for layer in layers for i in range(len(settings)))
    costs = measure_costs(log, settings, "flops", 1, torch.device("cpu"))
    assert all(costs.saving(layers[0], i) > 0 for i in (2, 3))  # a quarter of the keys, and of the picture
    choice = {layer: [i % 4, (i + 1) % 4 if i else None] for i, layer in enumerate(layers)}
    write_json(tmp_path / "mixed.json", recipe_of(choice, (0.5, 0.0), settings))
    exact = latents(pipe, 0, "a cat")
    with diffattn.patch(pipe, recipe=tmp_path / "mixed.json") as patch:
        drawn = latents(pipe, 0, "a cat")
        report = patch.report()
    found = {layer.name: layer.method for layer in report.layers if layer.accelerated}
    names = [name for name, _ in MIXED]
    pairs = {layer: {names[i] for i in chosen if i is not None} for layer, chosen in choice.items()}
    assert found == {layer: "+".join(sorted(pair)) for layer, pair in pairs.items()}
    assert report.method == "agent+inline+keys+tiles"
    assert drawn.isfinite().all()
    assert relative_error(drawn, exact) > 1e-3


def test_tuning_chooses_among_methods(pipe: DiffusionPipeline) -> None:
    found = diffattn.tune(pipe, PROMPTS[:1], max_error=0.5, **(SMALL | {"candidates": MIXED, "checks": 3}))
    chosen = {setting["method"] for setting in found.recipe["settings"].values()}
    assert chosen <= {name for name, _ in MIXED}
    alone = diffattn.tune(pipe, PROMPTS[:1], max_error=0.5, **(SMALL | {"candidates": MIXED[3:], "checks": 3}))
    assert found.speedup >= alone.speedup * 0.99
    with diffattn.patch(pipe, recipe=found.recipe) as patch:
        latents(pipe, 0, PROMPTS[0])
        assert patch.report().layers_accelerated > 0


@pytest.mark.parametrize(("budget", "near"), [({"max_error": 0.1}, "landmarks"), ({"min_speedup": 1.03}, "pool")])
def test_whole_runs_decide_between_methods(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, budget: dict[str, float], near: str
) -> None:
    """Probes find pooled agents worth their error in some places, and landmarks in others; here, whole runs do not."""

    def errors(search: Search, recipe: dict[str, Any]) -> tuple[float, ...]:
        kinds = {setting["options"]["agents"] for setting in recipe["settings"].values()}
        return (0.01,) if kinds == {near} else (0.5,)

    monkeypatch.setattr(Search, "_errors", errors)
    monkeypatch.setattr("diffattn.tuning.search.FAR", math.inf)
    found = diffattn.tune(pipe, PROMPTS[:1], **budget, **SMALL)
    assert {setting["options"]["agents"] for setting in found.recipe["settings"].values()} == {near}
    assert found.verified.route.startswith(f"agent/{near}")


def test_a_probe_follows_text_beside_the_picture() -> None:
    case = next(case for case in CASES if str(case) == "SD3Transformer2DModel")
    model, given = case.build(), case.inputs(2, torch.Generator().manual_seed(1))
    exact, log, settings = case.call(model, given), Log(), settings_of(MIXED)
    with probing(model, settings, log):
        torch.testing.assert_close(case.call(model, given), exact, rtol=1e-4, atol=1e-5)
    assert len(log.kinds) == case.num_layers
    for layer in log.kinds:
        errors = [log.error(layer, 0, i) for i in range(len(settings))]
        assert errors[1] == math.inf  # InLine does not follow text
        assert all(0 < errors[i] < 2 for i in (0, 2, 3))
    costs = measure_costs(log, settings, "flops", 1, torch.device("cpu"))
    assert all(costs.saving(layer, i) > 0 for layer in log.kinds for i in (2, 3))


def test_the_recipe_keeps_its_promise_and_the_pipeline_is_left_alone(pipe: DiffusionPipeline, tuned: Tuned) -> None:
    exact = [latents(pipe, i, prompt) for i, prompt in enumerate(PROMPTS)]
    with diffattn.patch(pipe, recipe=tuned.recipe):
        errors = [relative_error(latents(pipe, i, p), exact[i]) for i, p in enumerate(PROMPTS)]
    assert errors == pytest.approx(tuned.recipe["verified"]["error_per_prompt"], rel=1e-3)
    assert 0 < sum(errors) / 3 < tuned.verified.promise <= 0.01
    assert tuned.recipe["promised"] == {"error": tuned.verified.promise, "speedup": tuned.speedup}
    assert tuned.recipe["protocol"]["max_error"] == 0.01
    assert tuned.speedup > 1.05
    assert tuned.verified.expected_speedup == pytest.approx(tuned.speedup, rel=1e-3)  # counted both times
    assert not pipe.unet._forward_pre_hooks  # type: ignore[attr-defined]


def test_calibration_expects_what_is_then_measured(tuned: Tuned) -> None:
    """Errors of different places add up as squares, near enough to know where to look."""
    for check in tuned.checks:
        assert 0.4 < check.error / check.expected < 2.5


def test_the_work_is_told_beforehand(pipe: DiffusionPipeline, tuned: Tuned, calls: list[int]) -> None:
    config = {key: value for key, value in SMALL.items() if key != "candidates"}
    work = workload(pipe, PROMPTS, max_error=0.01, **config)
    assert calls[0] <= work.total
    assert work.calls["exact runs"] == 12
    assert f"up to {work.total} denoiser calls" in str(work)


def test_the_protocol_says_what_the_promise_depends_on(tuned: Tuned, tmp_path: Path) -> None:
    tuned.save(tmp_path / "made" / "recipe.json")
    protocol = diffattn.patching.recipe.read_recipe(tmp_path / "made" / "recipe.json")["protocol"]  # type: ignore[attr-defined]
    assert (protocol["steps"], protocol["guidance"], protocol["width"], protocol["seeds"]) == (4, 3.0, 32, [0, 2])
    assert protocol["scheduler"] == "DDIMScheduler"
    assert len(protocol["bands"]) == 2
    assert "torch" in protocol["versions"]


def test_a_least_speed_up_is_reached_at_the_first_rung_that_does(pipe: DiffusionPipeline, tuned: Tuned) -> None:
    wanted = 1 + (tuned.speedup - 1) * 0.6
    calls: list[None] = []
    found = diffattn.tune(pipe, PROMPTS[:2], min_speedup=wanted, probed=1, on_call=lambda: calls.append(None), **SMALL)
    assert len(calls) <= workload(pipe, PROMPTS[:2], min_speedup=wanted, probed=1, **SMALL).total
    assert wanted <= found.speedup < tuned.speedup
    assert found.recipe["promised"] == {"error": found.verified.promise, "speedup": found.speedup}
    assert found.verified.error < tuned.verified.error * 1.2
    with pytest.raises(CannotTune, match=r"a speed-up of 9 cannot be reached: .* gives 1\.\d+$"):
        diffattn.tune(pipe, PROMPTS[:1], min_speedup=9.0, **SMALL)


def test_what_is_promised_is_measured_once_more(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times scatter, and the search stops where they happened to be good."""
    times: dict[str, Any] = {"now": iter(())}
    monkeypatch.setattr(Search, "speedup", lambda search, recipe: next(times["now"]))
    times["now"] = iter([2.0, 1.6, 1.6, 1.6, 1.6, 1.4, 1.45, 1.52])  # all cheap; the search; again, and one rung on
    found = diffattn.tune(pipe, PROMPTS[:1], min_speedup=1.5, checks=4, **SMALL)
    assert found.recipe["protocol"]["min_speedup"] == 1.5
    assert found.recipe["promised"]["speedup"] == found.recipe["verified"]["speedup"] == found.speedup == 1.52
    times["now"] = iter([2.0, *[1.6] * 4, *[1.4] * 4])
    with pytest.raises(CannotTune, match=r"a speed-up of 1\.5 was measured once, but not again: 1\.4 at most"):
        diffattn.tune(pipe, PROMPTS[:1], min_speedup=1.5, checks=4, **SMALL)


def test_settings_that_never_keep_the_picture_finite_are_told(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_calibrate, "_factors", lambda runs, exact, layers, bounds, *rest: [math.inf] * len(bounds))
    for budget in ({"max_error": 0.1}, {"min_speedup": 1.1}):
        with pytest.raises(CannotTune, match="no setting keeps the picture finite"):
            diffattn.tune(pipe, PROMPTS[:1], **budget, **SMALL)


def test_a_single_prompt_promises_with_a_margin(pipe: DiffusionPipeline) -> None:
    found = diffattn.tune(pipe, PROMPTS[:1], max_error=0.02, **(SMALL | {"bands": 1, "cost": "time", "rounds": 2}))
    assert found.verified.promise == pytest.approx(1.5 * found.verified.error)
    assert found.verified.promise <= 0.02
    assert found.recipe["protocol"]["cost"] == "time"
    with pytest.raises(CannotTune, match="no recipe stays within an error of 1e-09; the nearest tried has"):
        diffattn.tune(pipe, PROMPTS[:1], max_error=1e-9, checks=2, **(SMALL | {"bands": 1}))


def test_a_softmax_sit_is_tuned_as_well() -> None:
    sit = SiTPipeline(tiny_dit(attention="softmax"), FlowMatchEulerDiscreteScheduler(shift=1))
    sit.set_progress_bar_config(disable=True)
    found = diffattn.tune(sit, ["0", "1"], max_error=0.05, **(SMALL | {"guidance": 1.0}))
    with diffattn.patch(sit, recipe=found.recipe) as handle:
        sit([0], num_inference_steps=4, output_type="latent")
        assert handle.report().layers_accelerated > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a largest error .* or a smallest speed-up"),
        ({"max_error": 0.1, "min_speedup": 1.2}, "either a largest error"),
        ({"max_error": 0.0}, "max_error must be above 0 and at most 1, got 0.0"),
        ({"max_error": math.nan}, "max_error must be above 0"),
        ({"max_error": 1.5}, "max_error must be"),
        ({"min_speedup": 1.0}, "min_speedup must be a number above 1, got 1.0"),
        ({"min_speedup": math.inf}, "min_speedup must be"),
        ({"max_error": 0.1, "prompts": []}, "no prompts"),
        ({"max_error": 0.1, "bands": 0}, "bands must be 1 or more, got 0"),
        ({"max_error": 0.1, "steps": 0}, "steps must be 1 or more"),
        ({"max_error": 0.1, "cost": "money"}, "cost must be time or flops, got 'money'"),
        ({"max_error": 0.1, "width": 33}, "width 33"),
        ({"max_error": 0.1, "candidates": []}, "no candidates"),
        ({"max_error": 0.1, "candidates": [("linear", {})]}, "unknown method: 'linear'"),
        ({"max_error": 0.1, "candidates": [("agent", {"agent": 3})]}, "unknown option agent"),
        ({"max_error": 0.1, "bands": 65}, "bands must be at most 64, got 65"),
        ({"max_error": 0.1, "candidates": [("agent", {"max_level": 0, "num_agents": 500})]}, "no setting costs less"),
    ],
)
def test_bad_input_is_refused(pipe: DiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
    given = {"prompts": PROMPTS[:1], "steps": 2, "cost": "flops"} | arguments
    with pytest.raises(ValueError, match=message):
        diffattn.tune(pipe, given.pop("prompts"), **given)
    assert not pipe.unet._forward_pre_hooks  # type: ignore[attr-defined]


def test_a_patched_or_compiled_or_unsupported_pipeline_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    with diffattn.patch(pipe, **FEW), pytest.raises(ValueError, match=r"is patched; call diffattn\.unpatch"):
        diffattn.tune(pipe, PROMPTS, max_error=0.1)
    compiled: Any = tiny.pipeline("sd", tmp_path)
    compiled.unet.compile()
    with pytest.raises(ValueError, match="compiled; tune it before"):
        diffattn.tune(compiled, PROMPTS, max_error=0.1)
    with pytest.raises(TypeError, match="takes a picture as input"):
        diffattn.tune(tiny.pipeline("img2img", tmp_path), PROMPTS, max_error=0.1)
    sit = SiTPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler(shift=1))
    with pytest.raises(CannotTune, match="nothing to patch in DiT: 2 x mediator attention, which method 'agent' does"):
        diffattn.tune(sit, ["0"], max_error=0.1, steps=2)
