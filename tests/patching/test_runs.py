"""Whole runs of patched pipelines: schedulers, threads, any options."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny
from support.patching import FEW, Make, call
from support.watching import Watching
from torch import Tensor

import diffattn
from diffattn.architectures.base import Size
from diffattn.architectures.run_state import MOST_PLACES


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


# Schedulers in whole runs.


@pytest.mark.parametrize(
    ("name", "options", "calls"),
    [
        ("DDIMScheduler", {}, 6),
        ("PNDMScheduler", {"skip_prk_steps": True}, 7),
        ("HeunDiscreteScheduler", {}, 11),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 6),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 6),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 6),
        ("LCMScheduler", {}, 6),
        ("EDMEulerScheduler", {}, 6),
        ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 11),
    ],
)
def test_a_run_falls_through_its_phases_once_with_any_scheduler(
    pipe: DiffusionPipeline, name: str, options: dict[str, Any], calls: int
) -> None:
    sd = {} if name.startswith("EDM") else {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = getattr(diffusers, name)(**sd, **options)
    schedule = Watching({0.7: {}, 0.4: {"num_agents": 9}, 0.0: "exact"})
    handle = diffattn.patch(pipe, **FEW, schedule=schedule)
    phases = schedule.seen_phases
    for runs in (1, 2):
        phases.clear()
        assert tiny.run(pipe, num_inference_steps=6).isfinite().all()
        assert phases == sorted(phases)
        assert set(phases) == {0, 1, 2}
        assert (handle.report().runs, handle.report().calls) == (runs, calls * runs)


def test_levels_that_rise_a_little_within_a_run_do_not_begin_another(pipe: DiffusionPipeline) -> None:
    """Those of KDPM2's pairs of steps do, since it rounds them to whole time steps."""
    pipe.scheduler = diffusers.KDPM2AncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True
    )
    schedule = {"kind": "latent_change", "entries": [{"num_agents": 4}, {}], "thresholds": [0.95], "first": 1}
    handle = diffattn.patch(pipe, **FEW, schedule=schedule)
    for runs in (1, 2):
        tiny.run(pipe, num_inference_steps=20)
        levels, phases = ([entry[name] for entry in handle.trace()] for name in ("noise_level", "phase"))
        assert handle.report().runs == runs
        assert len(phases) == 39
        assert any(b > a for a, b in pairwise(levels))
        assert phases == sorted(phases)
        assert set(phases) == {0, 1}


class Foreign:
    """A scheduler that has nothing of diffusers' but what a pipeline calls."""

    config: Any

    order, init_noise_sigma = 1, 1.0

    def set_timesteps(self, number: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, number)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(self, noise: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> tuple[Tensor]:
        return (sample - 0.1 * noise,)


@pytest.mark.parametrize("config", [None, SimpleNamespace(num_train_timesteps=1000)])
def test_a_scheduler_that_is_not_of_diffusers_is_drawn_with(pipe: DiffusionPipeline, config: Any) -> None:
    pipe.scheduler = scheduler = Foreign()
    if config is not None:
        scheduler.config = config
    handle = diffattn.patch(pipe, **FEW)
    tiny.run(pipe, num_inference_steps=4)
    assert (handle.report().runs, handle.report().calls_passed_through) == (1, 0)
    assert [entry["noise_level"] for entry in handle.trace()] == [None] * 4


def test_an_aborted_run_leaves_nothing_behind(pipe: DiffusionPipeline) -> None:
    handle = diffattn.patch(pipe, **FEW)
    expected = tiny.run(pipe)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    for runs in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, callback_on_step_end=stop)  # after the first step: the next run starts at the same level
        assert torch.equal(tiny.run(pipe), expected)
        assert handle.report().runs == runs + 1


def test_one_time_step_used_for_many_pictures_keeps_no_more_than_some() -> None:
    unet = tiny.unet()
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(1)
    handle = diffattn.patch(unet, **FEW)
    t, state, kept = scheduler.timesteps[0], handle._runs.state, set[int]()
    for number in range(MOST_PLACES + 50):
        call(unet, timestep=t)
        if number >= MOST_PLACES:
            kept.add(len(state.memory))
    assert len(kept) == 1
    assert max(place for _, _, place in state.memory) == MOST_PLACES - 1
    assert handle.report().calls_passed_through == 0


class EveryOther:
    """A schedule of a user's own: agents in every other call."""

    def __init__(self) -> None:
        self.phases = ({}, None)
        self.seen: list[tuple[int, torch.Size, list[float], int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "EveryOther":
        new = EveryOther()
        new.seen = self.seen  # every run has its own copy; here they tell the first what they saw
        return new

    def start(self, batch: int) -> None:
        self.batch, self.calls = batch, 0

    def observe(self, latents: Tensor, noise_levels: Sequence[float]) -> None:
        self.calls += 1
        self.seen.append((self.batch, latents.shape, list(noise_levels), self.phase()))

    def phase(self) -> int:
        return (self.calls + 1) % 2

    def reachable(self, noise_levels: Any) -> set[int]:
        return {0, 1}


def test_a_schedule_of_ones_own(pipe: DiffusionPipeline) -> None:
    schedule = EveryOther()
    handle = diffattn.patch(pipe, schedule=schedule, **FEW)
    for _ in range(2):
        tiny.run(pipe, num_inference_steps=5)
    assert [(batch, shape) for batch, shape, *_ in schedule.seen] == [(2, (2, 4, 16, 16))] * 10
    assert [phase for *_, phase in schedule.seen] == [0, 1, 0, 1, 0] * 2
    levels = [levels for *_, levels, _ in schedule.seen[:5]]
    assert levels == sorted(levels, reverse=True)
    assert (handle.report().calls_accelerated, handle.report().calls_passed_through) == (7 * 6, 7 * 4)


# Threads.


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
def test_two_threads_on_one_patched_denoiser_do_not_mix() -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **FEW, schedule={0.6: {}, 0.3: {"num_agents": 20}, 0.0: "exact"})
    plans = {
        0: ((16, 16), [951, 800, 600, 400, 200, 20]),
        1: ((12, 20), [20, 200, 951, 400, 20, 951]),
    }

    def run(which: int) -> list[Tensor]:
        size, steps = plans[which]
        return [call(unet, size=size, timestep=torch.tensor(t)) for t in steps]

    alone = {which: run(which) for which in plans}
    calls = handle.report().calls_accelerated
    barrier = threading.Barrier(2)

    def both_are_inside_a_forward(*_: Any) -> None:
        barrier.wait(20)

    meet = unet.conv_in.register_forward_pre_hook(both_are_inside_a_forward)
    with ThreadPoolExecutor(2) as pool:
        together = dict(zip(plans, pool.map(run, plans), strict=True))
    meet.remove()
    for which in plans:
        for a, b in zip(together[which], alone[which], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert handle.report().calls_accelerated == 2 * calls


@pytest.mark.slow
def test_two_threads_with_a_pipeline_each_around_one_patched_denoiser_do_not_mix(pipe: Any) -> None:
    handle = diffattn.patch(pipe, **FEW)
    other = type(pipe)(**(pipe.components | {"scheduler": tiny.scheduler()}), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    runs = [(pipe, 1, "a cat", 6), (other, 2, ["a dog", "a bird"], 9)]

    def run(which: int) -> Tensor:
        pipe, seed, prompt, steps = runs[which]
        return tiny.run(pipe, seed=seed, prompt=prompt, num_inference_steps=steps)

    alone = [run(0), run(1)]
    calls = handle.report().calls_accelerated
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert handle.report().calls_accelerated == 2 * calls


# Properties.

UNET = tiny.unet()


@pytest.mark.slow
@given(
    size=st.tuples(st.integers(4, 22), st.integers(4, 22)),
    agents=st.sampled_from(["pool", "merge", "landmarks"]),
    num_agents=st.one_of(st.none(), st.integers(1, 15)),
    agent_ratio=st.one_of(st.none(), st.floats(0.5, 0.999)),
    merge_ratio=st.floats(0, 0.9),
    merge_stride=st.integers(2, 5),
    scale_exponent=st.floats(0, 1),
    shortcut=st.floats(-0.5, 0.5),
    timestep=st.integers(0, 999),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")
def test_any_size_with_any_options_is_finite_and_restored(
    size: tuple[int, int], timestep: int, num_agents: int | None, agent_ratio: float | None, **options: Any
) -> None:
    if num_agents is None and agent_ratio is None:
        num_agents = 2
    if options["agents"] == "landmarks":
        options = {"agents": "landmarks"}
    exact = call(UNET, size=size, timestep=timestep)
    options |= {"num_agents": num_agents, "agent_ratio": agent_ratio, "min_tokens": 0, "schedule": {0.0: {}}}
    with diffattn.patch(UNET, **options) as handle:
        out = call(UNET, size=size, timestep=timestep)
        report = handle.report()
    assert out.shape == exact.shape
    assert out.isfinite().all()
    assert report.calls_accelerated + report.calls_passed_through == 7
    assert torch.equal(call(UNET, size=size, timestep=timestep), exact)


def test_a_call_keeps_its_grids_when_another_thread_sets_a_size_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **FEW)
    expected = call(unet, size=(16, 16), timestep=torch.tensor(800))
    accelerated = handle.report().calls_accelerated
    denoiser = handle._runs.denoisers[0]
    read_time = denoiser.read_time

    def meanwhile(*args: Any) -> Any:
        denoiser.set_size(Size(12, 20))
        return read_time(*args)

    monkeypatch.setattr(denoiser, "read_time", meanwhile)
    found = call(unet, size=(16, 16), timestep=torch.tensor(700))
    assert found.shape == expected.shape
    assert handle.report().calls_accelerated == 2 * accelerated
