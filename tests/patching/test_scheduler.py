"""The scheduler that is read is the one that draws, whoever owns the denoiser; unknown ones are reported."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from support import tiny, tiny_joint
from support.denoisers import CASES
from support.denoisers.case import Case
from support.patching import FEW, Make, call
from torch.overrides import TorchFunctionMode

import diffattn
from diffattn import DiffAttnWarning

SCHEDULE = {0.7: {}, 0.4: {"num_agents": 9}, 0.0: "exact"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS: dict[str, Callable[[], Any]] = {
    "edm": EDMEulerScheduler,
    "continuous": lambda: EulerDiscreteScheduler(
        **SD, timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "log-linear": lambda: EulerDiscreteScheduler(**SD, interpolation_type="log_linear"),
    "flow": lambda: UniPCMultistepScheduler(
        steps_offset=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
pytestmark = pytest.mark.filterwarnings("error::diffattn.DiffAttnWarning")


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


def true_levels(scheduler: Any) -> list[float]:
    """Of the scheduler's own σ."""
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].double()
    if scheduler.config.get("use_flow_sigmas"):
        return sigmas.tolist()
    sigmas = sigmas / scheduler.config.get("sigma_data", 1.0)
    return (sigmas / (1 + sigmas)).tolist()


def levels_seen(handle: diffattn.Patch) -> Any:
    return pytest.approx([entry["noise_level"] for entry in handle.trace()], abs=1e-4)


@every_kind
@pytest.mark.parametrize("what", ["pipeline", "denoiser"])
def test_of_the_pipeline_that_draws(pipe: Any, make: Callable[[], Any], what: str) -> None:
    handle = diffattn.patch(pipe if what == "pipeline" else pipe.unet, **FEW, schedule=SCHEDULE)
    pipe.scheduler = make()  # assigned after patching
    for _ in range(2):
        tiny.run(pipe, num_inference_steps=6)
        assert true_levels(pipe.scheduler) == levels_seen(handle)
    assert handle.report().runs == 2


@every_kind
def test_of_a_sibling_and_of_a_pipeline_made_of_the_components(pipe: Any, make: Callable[[], Any]) -> None:
    handle = diffattn.patch(pipe, **FEW, schedule=SCHEDULE)
    sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    sibling.scheduler = make()
    sibling("a cat", image=tiny.picture(), strength=1.0, num_inference_steps=6, output_type="np")
    assert true_levels(sibling.scheduler) == levels_seen(handle)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"scheduler": make()}
    rebuilt = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    rebuilt.set_progress_bar_config(disable=True)
    tiny.run(rebuilt, num_inference_steps=6)
    assert true_levels(rebuilt.scheduler) == levels_seen(handle)
    tiny.run(pipe, num_inference_steps=6)  # and back
    a = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    assert (1 / (1 + (a / (1 - a)).sqrt())).tolist() == levels_seen(handle)


@every_kind
@pytest.mark.parametrize("as_number", [False, True], ids=["views", "numbers"])
def test_of_a_loop_of_ones_own(make: Callable[[], Any], as_number: bool) -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **FEW, schedule=SCHEDULE)

    def draw(scheduler: Any) -> None:
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            call(unet, timestep=t.item() if as_number else t)

    draw(scheduler := make())
    assert true_levels(scheduler) == levels_seen(handle)
    assert handle.report().runs == 1


class CountConversions(TorchFunctionMode):
    """Counts how often a scheduler's time steps are copied to the host."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler, self.number = scheduler, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.Tensor.tolist and args[0] is self.scheduler.timesteps
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("whose", ["of the loop", "of the pipeline"])
def test_a_loop_with_numbers_converts_the_time_steps_once_per_run(pipe: Any, whose: str) -> None:
    handle = diffattn.patch(pipe if whose == "of the pipeline" else pipe.unet, **FEW, schedule=SCHEDULE)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(6)
    times = scheduler.timesteps.tolist()
    with CountConversions(scheduler) as conversions:
        for t in times:
            call(pipe.unet, timestep=t)
        assert conversions.number == 1
        scheduler.set_timesteps(6)  # a run of its own
        for t in times:
            call(pipe.unet, timestep=t)
        assert conversions.number == 2
    assert handle.report().runs == 2


class Studio:
    """Draws with a loop of its own, around a pipeline."""

    def __init__(self, pipe: Any, handle: diffattn.Patch) -> None:
        self.pipe, self.handle = pipe, handle

    def draw(self) -> list[float]:
        self.pipe.scheduler.set_timesteps(6)
        for t in self.pipe.scheduler.timesteps:
            call(self.pipe.unet, timestep=t)
        return [entry["noise_level"] for entry in self.handle.trace()]


@every_kind
def test_of_a_loop_around_a_pipeline(pipe: Any, make: Callable[[], Any]) -> None:
    studio = Studio(pipe, diffattn.patch(pipe.unet, **FEW, schedule=SCHEDULE))
    pipe.scheduler = make()
    with ThreadPoolExecutor(1) as pool:  # no variable of this function is in sight
        found = pool.submit(studio.draw).result()
    assert found == pytest.approx(true_levels(pipe.scheduler), abs=1e-4)


@pytest.mark.slow
def test_pipelines_that_take_turns_on_one_denoiser(pipe: Any) -> None:
    parts: dict[str, Any] = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    parts["scheduler"] = EDMEulerScheduler()
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    handle = diffattn.patch(pipe.unet, **FEW, schedule=SCHEDULE)
    for drawing in (pipe, other, pipe):
        tiny.run(drawing, num_inference_steps=6)
        first = handle.trace()[0]["noise_level"]
        assert first == pytest.approx(0.99 if drawing is other else 0.86, abs=0.01)


def test_a_scheduler_with_other_numbers_nearby_is_not_taken_for_it(pipe: Any) -> None:
    """By hand, at a whole number: as the model was trained, whatever lies around."""
    nearby = EDMEulerScheduler()
    nearby.set_timesteps(5)
    handle = diffattn.patch(pipe.unet, **FEW, schedule=SCHEDULE)
    call(pipe.unet, timestep=500)
    a = DDIMScheduler(**SD).alphas_cumprod[500].item()
    assert handle.trace()[0]["noise_level"] == pytest.approx(1 / (1 + (a / (1 - a)) ** 0.5), abs=1e-5)


@pytest.mark.filterwarnings("default::diffattn.DiffAttnWarning")
@pytest.mark.parametrize("times", [[1.0955, 0.62, -0.3], [0.9, 0.5], [937.5, 857.14]], ids=["edm", "0 to 1", "flow"])
@pytest.mark.parametrize("holder", ["denoiser", "pipeline"])
def test_what_nobody_knows_is_said_once_and_runs_exact(pipe: Any, times: list[float], holder: str) -> None:
    exact = [call(pipe.unet, timestep=t) for t in times]
    handle = diffattn.patch(pipe if holder == "pipeline" else pipe.unet, **FEW, schedule=SCHEDULE)
    with pytest.warns(DiffAttnWarning, match="noise level, which cannot be read") as warned:
        found = [call(pipe.unet, timestep=t) for t in times]
    assert len(warned) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    entry = {"noise_level": None, "phase": None, "options": "exact", "change": None}
    assert handle.trace() == [entry] * len(times)
    assert handle.report().calls_accelerated == 0
    assert {r for x in handle.report().layers for r in x.passed_through} == {"the noise level is not known"}


@pytest.mark.parametrize("schedule", [None, {"kind": "latent_change", "entries": [{}, {}], "thresholds": [0.5]}])
def test_a_schedule_that_does_not_need_the_level_runs_on(schedule: Any) -> None:
    handle = diffattn.patch(unet := tiny.unet(), **FEW, schedule=schedule)
    for t in (0.9, 0.5, 0.1):
        call(unet, timestep=t)
    assert (handle.report().runs, handle.report().calls_accelerated) == (1, 21)
    assert handle.trace()[0]["noise_level"] is None


# Pipelines that scale the time step, so that it is no view of the scheduler's.

LIMITED: Any = FEW | {"max_head_error": 1e-9, "calibrate": False}
heads_run_exact = pytest.mark.filterwarnings("default::diffattn.DiffAttnWarning")


def draw_flux(pipe: Any, steps: int) -> None:
    pipe("a cat", num_inference_steps=steps, height=64, width=64, max_sequence_length=16, output_type="latent")


@heads_run_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_and_rounded_time_step_is_that_of_the_loop(tmp_path: Any, dtype: torch.dtype) -> None:
    """In bfloat16 several of a hundred steps are the same number."""
    pipe = tiny_joint.flux_pipeline(tmp_path).to(dtype)
    handle = diffattn.patch(pipe, **LIMITED)
    with pytest.warns(DiffAttnWarning, match="100% of the heads run exact"):
        draw_flux(pipe, 100)
    found = [entry["noise_level"] for entry in handle.trace()]
    assert found == pytest.approx(pipe.scheduler.sigmas[:100].tolist(), abs=1e-4)
    report = handle.report()
    layers = len([layer for layer in report.layers if layer.left_alone is None])
    every = pipe.transformer.config.num_layers + pipe.transformer.config.num_single_layers
    assert layers == every
    looks = -(-100 // 9)  # heads are looked at in the first call, and again after every eight that ran exact
    assert (report.calls_accelerated, report.calls_passed_through) == (looks * every, (100 - looks) * every)


@heads_run_exact
def test_every_picture_of_one_step_is_a_run(tmp_path: Any) -> None:
    handle = diffattn.patch(pipe := tiny_joint.flux_pipeline(tmp_path), **FEW)
    for runs in (1, 2, 3):
        draw_flux(pipe, 1)
        assert (handle.report().runs, len(handle.trace())) == (runs, 1)


@heads_run_exact
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_pipeline_that_names_contexts_for_caches_has_its_heads_checked_when_compiled(tmp_path: Any) -> None:
    """`cache_context` leaves an empty registry of hooks on the denoiser."""
    pipe = tiny_joint.flux_pipeline(tmp_path)
    pipe.transformer.compile(backend="eager")
    handle = diffattn.patch(pipe, **LIMITED)
    draw_flux(pipe, 3)
    assert hasattr(pipe.transformer, "_diffusers_hook")
    layers = [layer for layer in handle.report().layers if layer.left_alone is None]
    assert all(layer.passed_through == {"most heads are too far from exact attention": 3} for layer in layers)


def draw_by_hand(case: Case, model: Any, given: Any, scheduler: Any) -> None:
    for t in scheduler.timesteps:
        case.call(model, given, float(t) / 1000)


def test_by_hand_a_scaled_time_step_belongs_to_a_run_only_in_a_loop(tmp_path: Any) -> None:
    pipe = tiny_joint.flux_pipeline(tmp_path)
    pipe.scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps.tolist()
    case = next(case for case in CASES if case.name == "FluxTransformer2DModel")
    given = case.inputs(2, torch.Generator().manual_seed(1))
    handle = diffattn.patch(model := case.build(), **LIMITED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffAttnWarning)  # that all heads run exact
        draw_by_hand(case, model, given, pipe.scheduler)
    assert handle.report().calls_passed_through == 3 * case.num_calls(2)
    handle.remove()
    handle = diffattn.patch(model, **LIMITED)
    for time in times:
        case.call(model, given, time / 1000)
    assert handle.report().calls_passed_through == 0


def test_a_time_that_is_not_among_the_steps_does_not_end_the_run(pipe: Any) -> None:
    """As of a pipeline that evaluates its denoiser between two of the scheduler's steps."""
    handle = diffattn.patch(pipe.unet, **FEW, schedule=SCHEDULE)
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps[:3]:
        call(pipe.unet, timestep=t)
        call(pipe.unet, timestep=t - 7)
    assert handle.report().runs == 1
    assert [entry["phase"] for entry in handle.trace()] == sorted(entry["phase"] for entry in handle.trace())
    call(pipe.unet, timestep=900)
    assert handle.report().runs == 2
