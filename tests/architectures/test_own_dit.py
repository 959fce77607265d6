"""`diffattn.patch` on the DiT/SiT backbone and its pipeline: mediators by schedule, and training-free agents."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from support.compiling import WAYS
from support.patching import FEW
from support.tiny_dit import inputs, run, tiny_dit
from support.watching import Watching
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import diffattn
from diffattn import DiffAttnWarning, LatentChangeSchedule
from diffattn.models import DiT
from diffattn.noise_level import dit_alphas_cumprod
from diffattn.patching.patch import find_patch
from diffattn.sampling import EulerMaruyamaScheduler, SiTPipeline

AGENTS: Any = FEW | dict(method="agent", schedule={0.0: {}})
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mediator": ("mediator", dict(method="mediator", num_mediators=9)),
    "mediator by level": ("mediator", dict(method="mediator")),
    "agent pool": ("softmax", AGENTS | dict(agents="pool")),
    "agent landmarks": ("softmax", AGENTS),
    "agent merge": ("softmax", AGENTS | dict(agents="merge", merge_ratio=0.4)),
}
"""Attention of the model, and how it is patched."""

BY_LEVEL = {0.7: {"num_mediators": 4}, 0.3: {"num_mediators": 16}, 0.0: {"num_mediators": 64}}
BY_CHANGE = LatentChangeSchedule([{"num_mediators": n} for n in (4, 16, 64)], [0.99, 0.8], first=2)
BATCHED: Any = {"atol": 5e-4, "rtol": 1e-3}  # sums in another order, and an inverse behind them


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest) -> tuple[DiT, dict[str, Any]]:
    attention, options = VARIANTS[request.param]
    return tiny_dit(attention=attention), options


def steps(model: Any, times: tuple[float, ...] = (0.1, 0.5, 0.9)) -> Tensor:
    """Predictions of three calls, as a run makes them."""
    x, _, y = inputs()
    return torch.stack([run(model, x, torch.tensor(t), y) for t in times])


def pipeline(scheduler: Any = None, **overrides: Any) -> SiTPipeline:
    """Its weights are small, so that the latents settle."""
    model = tiny_dit(**overrides)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(0.1)
    pipe = SiTPipeline(model, scheduler or FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SiTPipeline, labels: Any = (1, 3), seed: int = 0, **more: Any) -> Any:
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    arguments: Any = dict(num_inference_steps=12, output_type="latent", return_trace=True)
    return pipe(list(labels), generator=seeds, **(arguments | more))


def anatomy(model: nn.Module) -> dict[str, Any]:
    seen: dict[str, Any] = {"": tuple(model.state_dict())}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        hooks = {k: dict(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
        seen[name or "model"] = (type(module), {k: id(v) for k, v in plain.items()}, hooks)
    return seen


# The contract.


def test_changes_the_output_and_gives_it_back_bit_by_bit(case: tuple[DiT, dict[str, Any]]) -> None:
    model, options = case
    original, before = steps(model), anatomy(model)
    handle = diffattn.patch(model, **options)
    patched = steps(model)
    assert patched.isfinite().all()
    assert not torch.allclose(patched[0], original[0], atol=1e-4)
    assert tuple(model.state_dict()) == before[""]
    report = handle.report()
    assert report.layers_accelerated == report.layers_patched == 2
    assert {layer.tokens for layer in report.layers} == {64}
    handle.remove()
    assert anatomy(model) == before
    assert torch.equal(steps(model), original)
    with diffattn.patch(model, **options):
        assert torch.equal(steps(model), patched)
    assert anatomy(model) == before


def test_patching_twice_is_refused_and_the_patch_can_be_found(case: tuple[DiT, dict[str, Any]]) -> None:
    model, options = case
    assert find_patch(model) is None
    handle = diffattn.patch(model, **options)
    assert find_patch(model) is handle
    with pytest.raises(ValueError, match="this DiT is already patched"):
        diffattn.patch(model, **options)
    diffattn.unpatch(model)
    diffattn.unpatch(model)
    assert find_patch(model) is None


def test_a_deep_copy_is_patched_and_independent(case: tuple[DiT, dict[str, Any]]) -> None:
    model, options = case
    original = steps(model)
    handle = diffattn.patch(model, **options)
    patched = steps(model)
    calls = handle.report().calls
    twin = copy.deepcopy(model)
    assert torch.equal(steps(twin), patched)
    assert handle.report().calls == calls
    diffattn.unpatch(twin)
    assert torch.equal(steps(twin), original)
    assert torch.equal(steps(model), patched)


def test_a_patched_model_saves_as_the_original(case: tuple[DiT, dict[str, Any]], tmp_path: Path) -> None:
    model, options = case
    original = steps(model)
    diffattn.patch(model, **options)
    model.save_pretrained(tmp_path)
    assert torch.equal(steps(DiT.from_pretrained(tmp_path)), original)


def test_samples_of_a_batch_do_not_see_each_other(case: tuple[DiT, dict[str, Any]]) -> None:
    """Three samples at three times, each in its phase."""
    model, options = case
    diffattn.patch(model, **options)
    x, _, y = inputs(batch=3)
    t = torch.tensor([0.9, 0.1, 0.5])
    alone = [run(model, x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(run(model, x, t, y), torch.cat(alone), **BATCHED)


def test_another_size_is_patched_too(case: tuple[DiT, dict[str, Any]]) -> None:
    model, options = case
    x, t, y = inputs(16, 24)
    original = run(model, x, t, y)
    handle = diffattn.patch(model, **options)
    assert not torch.allclose(run(model, x, t, y), original, atol=1e-4)
    assert {layer.tokens for layer in handle.report().layers} == {96}
    handle.remove()
    assert torch.equal(run(model, x, t, y), original)


def test_a_pipeline_is_patched_like_its_model(case: tuple[DiT, dict[str, Any]]) -> None:
    model, options = case
    pipe = SiTPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    original = draw(pipe).images
    with diffattn.patch(pipe, **options) as handle:
        patched = draw(pipe).images
        assert find_patch(pipe) is find_patch(model) is handle
        assert handle.report().runs == 1
        twin = copy.deepcopy(pipe)
    assert not torch.allclose(patched, original, atol=1e-4)
    assert torch.equal(draw(pipe).images, original)
    assert torch.equal(draw(twin).images, patched)


def test_gradients_through_recomputed_blocks(case: tuple[DiT, dict[str, Any]]) -> None:
    def gradient(checkpointing: bool) -> Tensor:
        model, options = copy.deepcopy(case)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        diffattn.patch(model, **options)
        x, _, y = inputs()
        x.requires_grad_()
        model(x, torch.tensor([0.1, 0.9]), y).sample.square().sum().backward()
        assert x.grad is not None
        return x.grad

    plain = gradient(False)
    assert plain.isfinite().all()
    assert plain.any()
    torch.testing.assert_close(gradient(True), plain, atol=1e-5, rtol=1e-4)


# Mediators.


@pytest.mark.parametrize("n", [4, 9, 16, 25, 64])
@pytest.mark.parametrize("attention", ["mediator", ["mediator", "softmax"]])
def test_a_constant_number_is_what_the_model_can_be_set_to(n: int, attention: Any) -> None:
    model, twin = tiny_dit(attention=attention), tiny_dit(attention=attention)
    twin.set_num_mediators(n)
    before = steps(model)
    with diffattn.patch(model, "mediator", num_mediators=n):
        assert torch.equal(steps(model), steps(twin))
        model.set_num_mediators(4)  # what the patch chooses comes first
        assert torch.equal(steps(model), steps(twin))
        model.set_num_mediators(64)
    assert torch.equal(steps(model), before)


def test_mediators_follow_the_noise_level_and_exact_is_the_model_as_it_is_set() -> None:
    model, twin = tiny_dit(), tiny_dit()
    model.set_num_mediators(9)
    diffattn.patch(model, "mediator", schedule={0.7: {"num_mediators": 4}, 0.3: {}, 0.2: "exact", 0.0: "exact"})
    x, _, y = inputs()
    for t, n in ((0.0, 4), (0.29, 4), (0.31, 9), (0.75, 9), (1.0, 9)):  # t is 1 - the noise level
        twin.set_num_mediators(n)
        t = torch.tensor([t])
        assert torch.equal(run(model, x, t, y), run(twin, x, t, y))
    reasons = diffattn.patching.patch.find_patch(model).report().layers[0].passed_through
    assert reasons == {"num_mediators is not given: the model's own setting runs": 1, "exact by schedule": 2}


def test_the_balanced_preset_uses_what_the_model_learned() -> None:
    model = tiny_dit(mediators=[4, 16])
    handle = diffattn.patch(model, "mediator")
    steps(model)
    assert handle.report().preset == "balanced"
    assert [call["options"]["num_mediators"] for call in handle.trace()] == [4, 16, 16]


def test_layers_without_mediators_are_left_alone_and_reported() -> None:
    model = tiny_dit(attention=["mediator", "agent", "softmax"], num_layers=3, num_agents=4)
    report = diffattn.patch(model, "mediator").report()
    assert [layer.left_alone for layer in report.layers] == [
        None,
        "agent attention, which method 'mediator' does not replace",
        "softmax attention, which method 'mediator' does not replace",
    ]
    diffattn.unpatch(model)
    report = diffattn.patch(model, **AGENTS).report()
    assert [layer.left_alone is None for layer in report.layers] == [False, False, True]
    assert "DiT: agent" in str(report)


def test_a_schedule_that_leaves_everything_as_it_is_warns() -> None:
    model = tiny_dit()
    original = steps(model)
    diffattn.patch(model, "mediator", schedule={0.0: {}})
    with pytest.warns(DiffAttnWarning, match="accelerates no layer in this run: num_mediators is not given"):
        assert torch.equal(steps(model), original)


def test_a_run_that_begins_exact_and_ends_otherwise_does_not_warn() -> None:
    handle = diffattn.patch(model := tiny_dit(), "mediator", schedule={0.5: "exact", 0.0: {"num_mediators": 4}})
    steps(model)
    assert (handle.report().calls_passed_through, handle.report().calls_accelerated) == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mediators": 5}, "num_mediators must be a perfect square, got 5; the nearest are 4 and 9"),
        ({"num_mediators": 1}, "from 4 to 64, got 1; the model learned 4, 16, 64"),
        ({"num_mediators": 81}, "from 4 to 64, got 81; the model learned 4, 16, 64"),
        ({"schedule": {0.5: {"num_mediators": 81}, 0.0: {}}}, "from 4 to 64, got 81"),
        ({"num_agents": 4}, "unknown option num_agents of method 'mediator'; allowed: num_mediators"),
        ({"schedule": {"kind": "latent_change"}}, "needs entries, thresholds"),
        ({"layers": ["blocks.7.attn"]}, "got blocks.7.attn; they are: blocks.0.attn"),
        ({"method": "agent"}, "nothing to patch in DiT: 2 x mediator attention, which method 'agent' does not replace"),
        ({"preset": "slow"}, "unknown preset of method 'mediator': 'slow'; allowed: balanced, fast"),
    ],
    ids=str,
)
def test_bad_input_is_refused_and_leaves_no_trace(options: Any, message: str) -> None:
    model = tiny_dit()
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        diffattn.patch(model, **({"method": "mediator"} | options))
    assert anatomy(model) == before


def test_a_model_without_mediators_is_refused() -> None:
    message = "nothing to patch in DiT: 2 x softmax attention, which method 'mediator' does not replace"
    with pytest.raises(ValueError, match=message):
        diffattn.patch(tiny_dit(attention="softmax"), "mediator")


def test_more_mediators_than_the_grid_has_room_for_is_an_error_of_the_run() -> None:
    model = tiny_dit()
    x, t, y = inputs(8, 8)
    diffattn.patch(model, "mediator", num_mediators=64)
    with pytest.raises(ValueError, match="num_mediators=64 is 8x8 and larger than the grid of 4x4 tokens"):
        run(model, x, t, y)


# Processors of others.


def test_a_processor_of_others_is_left_alone_and_one_that_displaces_ours_is_noticed() -> None:
    class Doubling:
        def __call__(self, layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Any, n: int) -> Tensor:
            return 2 * layer.attend(q, k, v, grid, n)

    model: Any = tiny_dit()
    model.blocks[0].attn.set_processor(Doubling())
    doubled = steps(model)
    handle = diffattn.patch(model, "mediator", num_mediators=4)
    assert handle.report().layers[0].left_alone == "custom processor Doubling"
    model.blocks[1].attn.set_processor(None)
    with pytest.warns(DiffAttnWarning, match="were replaced by the layer's own attention"):
        assert torch.equal(steps(model), doubled)
    handle.remove()
    assert torch.equal(steps(model), doubled)


def test_our_processor_that_comes_back_after_removal_is_the_layer_itself() -> None:
    model: Any = tiny_dit()
    original = steps(model)
    handle = diffattn.patch(model, "mediator", num_mediators=4)
    patched, ours = steps(model), model.blocks[0].attn.processor
    handle.remove()
    model.blocks[0].attn.set_processor(ours)
    assert torch.equal(steps(model), original)
    with diffattn.patch(model, "mediator", num_mediators=4):
        assert torch.equal(steps(model), patched)
    assert torch.equal(steps(model), original)


# Time steps.


def test_times_are_noise_levels_from_one_to_zero() -> None:
    schedule = Watching({0.0: {"num_mediators": 4}})
    handle = diffattn.patch(model := tiny_dit(), "mediator", schedule=schedule)
    x, _, y = inputs()
    for t in (torch.tensor(0.0), torch.tensor([0.25]), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 1.0])):
        run(model, x, t, y)
    assert schedule.levels == [[1.0], [0.75], [0.5], [0.5, 0.0]]
    assert handle.report().runs == 1
    with torch.no_grad():
        model(y=y, x=x, t=torch.tensor([0.125]))
    assert schedule.levels[-1] == [0.875]
    assert handle.report().runs == 2


def test_times_from_data_to_noise_are_discrete_steps() -> None:
    schedule = Watching({0.0: {}})
    model = tiny_dit(attention="softmax", prediction="epsilon", time_direction="data_to_noise")
    diffattn.patch(model, **(AGENTS | dict(schedule=schedule)))
    x, _, y = inputs()
    for t in (torch.tensor([999]), torch.tensor([500]), torch.tensor([500, 0])):
        run(model, x, t, y)
    alphas = torch.tensor(dit_alphas_cumprod(), dtype=torch.float64)
    torch.testing.assert_close(alphas, (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    levels = ((1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())).tolist()
    expected = [[levels[999]], [levels[500]], [levels[500], levels[0]]]
    assert [pytest.approx(seen) for seen in schedule.levels] == expected


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [(FlowMatchEulerDiscreteScheduler(), 6), (FlowMatchHeunDiscreteScheduler(), 11), (EulerMaruyamaScheduler(), 6)],
    ids=lambda x: type(x).__name__,
)
def test_a_run_of_the_pipeline_falls_through_its_phases_once(scheduler: Any, calls: int) -> None:
    pipe = pipeline(scheduler)
    schedule = Watching(BY_LEVEL)
    handle = diffattn.patch(pipe, "mediator", schedule=schedule)
    for runs in (1, 2):
        schedule.seen_phases.clear()
        draw(pipe, num_inference_steps=6, guidance_scale=2.0)
        assert schedule.seen_phases == sorted(schedule.seen_phases)
        assert set(schedule.seen_phases) == {0, 1, 2}
        assert (handle.report().runs, handle.report().calls) == (runs, runs * calls)


# Step-wise dynamic mediators.


def replay(pipe: SiTPipeline, trace: list[dict[str, Any]], **more: Any) -> Tensor:
    """The latents of the unpatched pipeline, with the numbers of mediators of a trace set by hand."""
    numbers = iter([call["options"]["num_mediators"] for call in trace])
    model = pipe.transformer
    hook = model.register_forward_pre_hook(lambda *_: model.set_num_mediators(next(numbers)))
    latents = draw(pipe, **more).images
    hook.remove()
    assert next(numbers, None) is None
    return latents


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, EulerMaruyamaScheduler],
    ids=lambda x: x.__name__,
)
def test_the_trace_tells_what_ran(scheduler: Any, guidance_scale: float) -> None:
    pipe = pipeline(scheduler())
    with diffattn.patch(pipe, "mediator", schedule=BY_CHANGE):
        out = draw(pipe, guidance_scale=guidance_scale)
    trace = json.loads(json.dumps(out.trace))
    assert trace == out.trace
    assert len(trace) == pipe.num_timesteps
    phases = [call["phase"] for call in trace]
    assert [call["options"]["num_mediators"] for call in trace] == [(4, 16, 64)[p] for p in phases]
    assert phases == sorted(phases)
    assert phases[0] == 0
    assert phases[-1] > 0
    levels = [call["noise_level"] for call in trace]
    assert levels == sorted(levels, reverse=True)
    assert [call["change"] is None for call in trace[:2]] == [True, True]
    assert all(call["change"] > 0 for call in trace[4:])
    assert torch.equal(out.images, replay(pipe, trace, guidance_scale=guidance_scale))


def test_changes_are_those_between_the_latents_of_a_run() -> None:
    pipe = pipeline()
    states: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"].clone())
        return {}

    diffattn.patch(pipe, "mediator", schedule=BY_CHANGE)
    trace = draw(pipe, callback_on_step_end=keep).trace
    expected = [(b - a).abs().mean().item() for a, b in pairwise(states)]
    assert [call["change"] for call in trace[2:]] == pytest.approx(expected[:-1])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_samples_that_decide_for_themselves_equal_separate_runs(guidance_scale: float) -> None:
    """In a batch under guidance, the two copies of a sample have the same latents and so the same phase."""
    pipe = pipeline()
    values = BY_CHANGE.to_dict() | {"per_sample": True}
    labels = (1, 3, 0, 2)
    with diffattn.patch(pipe, "mediator", schedule=values):
        together = draw(pipe, labels, guidance_scale=guidance_scale)
        alone = [draw(pipe, [c], seed=i, guidance_scale=guidance_scale) for i, c in enumerate(labels)]
    torch.testing.assert_close(together.images, torch.cat([a.images for a in alone]), **BATCHED)
    copies = 1 if guidance_scale == 1 else 2
    phases = [c["phase"] if isinstance(c["phase"], list) else [c["phase"]] * 4 * copies for c in together.trace]
    assert phases == [[a.trace[k]["phase"] for a in alone] * copies for k in range(12)]
    assert any(len(set(p)) > 1 for p in phases)  # they do differ
    assert len(together.trace[-1]["change"]) == 4 * copies


def test_agents_can_follow_the_change_too() -> None:
    pipe = pipeline(attention="softmax")
    schedule = LatentChangeSchedule([{"num_agents": 4}, {"num_agents": 9}, "exact"], [0.99, 0.8], first=2)
    diffattn.patch(pipe, **(AGENTS | dict(schedule=schedule)))
    trace = draw(pipe).trace
    assert trace[0]["options"]["num_agents"] == 4
    last = trace[-1]["options"]
    assert last == "exact" or last["num_agents"] == 9


def test_a_run_that_was_broken_off_leaves_nothing_behind() -> None:
    pipe = pipeline()
    handle = diffattn.patch(pipe, "mediator", recipe={"schedule": BY_CHANGE.to_dict()})
    expected = draw(pipe)

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == at:
            raise KeyboardInterrupt
        return {}

    for at in (0, 5):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert len(handle.trace()) == at + 1
        again = draw(pipe)
        assert torch.equal(again.images, expected.images)
        assert again.trace == expected.trace
    assert handle.report().runs == 5


def test_a_trace_is_the_callers_own_and_of_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.architectures.run_state.LONGEST_TRACE", 3)
    handle = diffattn.patch(model := tiny_dit(), "mediator", num_mediators=4)
    assert handle.trace() == []
    steps(model, (0.5,) * 5)  # one noise level: no new run
    trace = handle.trace()
    assert trace == [{"noise_level": 0.5, "phase": 1, "options": {"num_mediators": 4}, "change": None}] * 3
    trace[0]["options"]["num_mediators"] = 99
    assert handle.trace()[0]["options"] == {"num_mediators": 4}


def test_two_threads_on_one_patched_model_do_not_mix() -> None:
    pipe = pipeline()
    other = SiTPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler())
    other.set_progress_bar_config(disable=True)
    diffattn.patch(pipe, "mediator", schedule=BY_CHANGE)
    runs = [(pipe, (1, 3), 0, 12), (other, (0,), 5, 17)]

    def one(which: int) -> Any:
        p, labels, seed, num_steps = runs[which]
        return draw(p, labels, seed, num_inference_steps=num_steps)

    alone = [one(0), one(1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(one, range(2)))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.images, b.images, atol=1e-5, rtol=1e-4)
        assert [c["phase"] for c in a.trace] == [c["phase"] for c in b.trace]


# Compiled.


COMPILED = {
    "mediator": ("mediator", dict(method="mediator", schedule=BY_LEVEL)),
    "agent": ("softmax", AGENTS | dict(schedule={0.7: {"num_agents": 4}, 0.3: {}, 0.0: "exact"})),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("variant", "way"), [*(("mediator", way) for way in WAYS), ("agent", WAYS[0])])
def test_compile_then_patch_is_one_graph_per_phase(variant: str, way: Any) -> None:
    attention, options = COMPILED[variant]
    times = (0.1, 0.4, 0.5, 0.9)
    plain = tiny_dit(attention=attention)
    exact = steps(plain, times)
    with diffattn.patch(plain, **options):
        patched = steps(plain, times)
    before = CompileCounter()
    steps(way(tiny_dit(attention=attention), before), times)
    torch._dynamo.reset()

    counter = CompileCounter()
    model = way(tiny_dit(attention=attention), counter)
    handle = diffattn.patch(model, **options)
    torch.testing.assert_close(steps(model, times), patched, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 3 * before.frame_count
    assert sum(counters["graph_break"].values()) == 0
    steps(model, times)
    assert counter.frame_count == 3 * before.frame_count
    assert handle.report().calls == 8
    assert handle.report().calls_accelerated == 2 * 2 * (4 if variant == "mediator" else 3)
    handle.remove()
    torch.testing.assert_close(steps(model, times), exact, atol=1e-5, rtol=1e-4)
