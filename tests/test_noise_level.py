"""Noise levels read off time steps: against those computed from each scheduler's own tables."""

import functools
import operator
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from support import tiny
from support.watching import Watching
from torch import Tensor
from torch.overrides import TorchFunctionMode

import diffattn
from diffattn.noise_level import NoiseLevels, stable_diffusion_alphas_cumprod

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def from_alphas(s: Any) -> Tensor:
    """√(1-ᾱ) / (√ᾱ + √(1-ᾱ)) at integer time steps."""
    signal, noise = s.alphas_cumprod[s.timesteps] ** 0.5, (1 - s.alphas_cumprod[s.timesteps]) ** 0.5
    return noise / (signal + noise)


def from_sigmas(s: Any) -> Tensor:
    """σ is noise over signal."""
    sigmas = s.sigmas[: len(s.timesteps)]
    return sigmas / (1 + sigmas)


def from_edm_sigmas(s: Any) -> Tensor:
    """σ over the standard deviation of the data."""
    sigmas = s.sigmas[: len(s.timesteps)] / s.config.sigma_data
    return sigmas / (1 + sigmas)


def from_flow_sigmas(s: Any) -> Tensor:
    """σ is the noise level."""
    return s.sigmas[: len(s.timesteps)]


SCHEDULERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Tensor] | None, float]] = {
    "ddpm": ("DDPMScheduler", SD, from_alphas, 1e-5),
    "ddim": ("DDIMScheduler", SD, from_alphas, 1e-5),
    "ddim zero snr": ("DDIMScheduler", ZERO_SNR, from_alphas, 1e-5),
    "ddim linear": ("DDIMScheduler", {}, from_alphas, 1e-5),
    "pndm": ("PNDMScheduler", SD | {"skip_prk_steps": True}, from_alphas, 1e-5),
    "lcm": ("LCMScheduler", SD, from_alphas, 1e-5),
    "tcd": ("TCDScheduler", SD, from_alphas, 1e-5),
    "euler": ("EulerDiscreteScheduler", SD, from_sigmas, 1e-3),
    "euler trailing": ("EulerDiscreteScheduler", SD | {"timestep_spacing": "trailing"}, from_sigmas, 1e-5),
    "euler karras": ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True}, from_sigmas, 1e-3),
    "euler exponential": ("EulerDiscreteScheduler", SD | {"use_exponential_sigmas": True}, from_sigmas, 1e-3),
    "euler log-linear": ("EulerDiscreteScheduler", SD | {"interpolation_type": "log_linear"}, from_sigmas, 1e-5),
    "euler zero snr": ("EulerDiscreteScheduler", ZERO_SNR, from_sigmas, 1e-3),
    "euler continuous": (
        "EulerDiscreteScheduler",
        SD | {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        from_sigmas,
        1e-4,
    ),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", SD, from_sigmas, 1e-3),
    "heun": ("HeunDiscreteScheduler", SD, from_sigmas, 1e-3),
    "heun karras": ("HeunDiscreteScheduler", SD | {"use_karras_sigmas": True}, from_sigmas, 1e-3),
    "kdpm2": ("KDPM2DiscreteScheduler", SD, None, 1e-3),  # its σ lie between the steps
    "dpm++": ("DPMSolverMultistepScheduler", SD, from_sigmas, 2e-3),
    "dpm++ karras": ("DPMSolverMultistepScheduler", SD | {"use_karras_sigmas": True}, from_sigmas, 3e-3),
    "dpm++ sde karras": (
        "DPMSolverMultistepScheduler",
        SD | {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        from_sigmas,
        3e-3,
    ),
    "dpm++ lu": ("DPMSolverMultistepScheduler", SD | {"use_lu_lambdas": True}, from_sigmas, 5e-3),
    "dpm++ exponential": ("DPMSolverMultistepScheduler", SD | {"use_exponential_sigmas": True}, from_sigmas, 1e-5),
    "dpm++ flow": ("DPMSolverMultistepScheduler", FLOW, from_flow_sigmas, 1.1e-3),
    "dpm++ flow, shift 3": ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 3.0}, from_flow_sigmas, 1.1e-3),
    "dpm++ single": ("DPMSolverSinglestepScheduler", SD, from_sigmas, 2e-3),
    "unipc": ("UniPCMultistepScheduler", SD, from_sigmas, 2e-3),
    "unipc flow": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}, from_flow_sigmas, 1.1e-3),
    "deis": ("DEISMultistepScheduler", SD, from_sigmas, 2e-3),
    "edm euler": ("EDMEulerScheduler", {}, from_edm_sigmas, 1e-4),
    "edm dpm++": ("EDMDPMSolverMultistepScheduler", {}, from_edm_sigmas, 1e-4),
    "edm dpm++ exponential": (
        "EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "sigma_data": 1.0}, from_edm_sigmas, 1e-4,
    ),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {}, from_flow_sigmas, 1e-5),
    "flow euler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, from_flow_sigmas, 1e-5),
    "flow euler, 50 training steps": (
        "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 50}, from_flow_sigmas, 1e-5,
    ),
    "flow heun, shift 3": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, from_flow_sigmas, 1e-5),
}  # fmt: skip
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def made(name: str, num_steps: int | None = 12) -> Any:
    kind, config, *_ = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**config)
    if num_steps is not None:
        scheduler.set_timesteps(num_steps)
    return scheduler


def levels_of(scheduler: Any) -> list[float]:
    levels = NoiseLevels(scheduler)
    return [levels.read(t).levels[0] for t in scheduler.timesteps]


@pytest.mark.parametrize("name", [name for name, (_, _, truth, _) in SCHEDULERS.items() if truth])
@pytest.mark.parametrize("num_steps", [4, 25])
def test_levels_are_those_of_the_schedulers_own_tables(name: str, num_steps: int) -> None:
    _, _, truth, tolerance = SCHEDULERS[name]
    assert truth is not None
    scheduler = made(name, num_steps)
    torch.testing.assert_close(
        torch.tensor(levels_of(scheduler), dtype=torch.float64), truth(scheduler).double(), atol=tolerance, rtol=0
    )


@every_scheduler
def test_levels_fall_over_a_run_from_near_one_towards_zero(name: str) -> None:
    levels = levels_of(made(name, 25))
    assert all(a >= b for a, b in pairwise(levels))
    assert 0.85 < levels[0] <= 1
    assert 0 <= levels[-1] < 0.25


@every_scheduler
def test_values_give_the_levels_that_views_give(name: str) -> None:
    scheduler = made(name)
    levels = NoiseLevels(scheduler)
    for t in scheduler.timesteps:
        by_view = levels.read(t).levels
        assert levels.read(t.clone()).levels == pytest.approx(by_view, abs=1e-6)
        assert levels.read(t.item()).levels == pytest.approx(by_view, abs=1e-6)
        assert levels.read(t.clone().expand(3)).levels == pytest.approx(by_view, abs=1e-6)
        assert levels.read(t.double().repeat(3)).levels == pytest.approx(by_view, abs=1e-6)


@every_scheduler
def test_a_run_that_is_prepared_anew_is_read_anew(name: str) -> None:
    scheduler = made(name, 30)
    levels = NoiseLevels(scheduler)
    levels.read(scheduler.timesteps[3])
    scheduler.set_timesteps(6)
    assert [levels.read(t).levels[0] for t in scheduler.timesteps] == levels_of(scheduler)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_starts_at_pure_noise(kind: str) -> None:
    scheduler = getattr(diffusers, kind)(**ZERO_SNR)
    scheduler.set_timesteps(10)
    assert levels_of(scheduler)[0] == pytest.approx(1, abs=1e-3)
    assert NoiseLevels(scheduler).read(999).levels[0] == pytest.approx(1, abs=1e-3)


def test_heuns_second_evaluation_is_at_the_level_of_the_next_step() -> None:
    levels = levels_of(made("heun", 5))
    assert len(levels) == 9
    assert levels[1::2] == levels[2::2]


# Views and values.


def test_the_rest_of_the_run_is_known_for_a_view() -> None:
    scheduler = made("ddim", 10)
    levels = NoiseLevels(scheduler)
    seen = levels.read(scheduler.timesteps[4])
    assert seen.levels == seen.to_come[:1]
    assert seen.to_come == levels_of(scheduler)[4:]
    by_value = levels.read(scheduler.timesteps[4].item())
    assert by_value.levels == by_value.to_come == seen.levels


@pytest.mark.parametrize("start", [0, 3, 9])
def test_a_shortened_run_as_in_img2img_keeps_its_levels(start: int) -> None:
    scheduler = made("ddim", 10)
    levels = NoiseLevels(scheduler)
    steps = scheduler.timesteps[start:]
    assert [levels.read(t).to_come for t in steps] == [levels_of(scheduler)[i:] for i in range(start, 10)]


def test_steps_per_sample_give_a_level_each() -> None:
    scheduler = made("ddim")
    steps = torch.tensor([981, 500, 20, 500])
    levels = NoiseLevels(scheduler).read(steps).levels
    assert len(levels) == 4
    assert levels == [NoiseLevels(scheduler).read(int(t)).levels[0] for t in steps]


def test_the_whole_schedule_given_as_steps_per_sample_is_a_level_each() -> None:
    scheduler = made("ddim", 4)
    assert NoiseLevels(scheduler).read(scheduler.timesteps).levels == pytest.approx(levels_of(scheduler))


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor(500.0)])
def test_numbers_and_tensors_without_a_scheduler_follow_stable_diffusions_training(timestep: Any) -> None:
    truth = DDIMScheduler(**SD).alphas_cumprod[500].double()
    sigma = ((1 - truth) / truth).sqrt().item()
    assert NoiseLevels().read(timestep).levels == pytest.approx([sigma / (1 + sigma)], abs=1e-5)


def test_stable_diffusions_training_schedule_is_diffusers() -> None:
    torch.testing.assert_close(
        torch.tensor(stable_diffusion_alphas_cumprod(), dtype=torch.float64),
        DDIMScheduler(**SD).alphas_cumprod.double(),
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("timestep", [-5, 0, 999, 5000, 1e9, -1.5])
def test_steps_out_of_range_stay_between_noise_and_data(timestep: float) -> None:
    for name in ("ddim", "flow euler", "edm euler", "euler"):
        assert 0 <= NoiseLevels(made(name)).read(timestep).levels[0] <= 1


def test_a_scheduler_that_was_never_prepared_is_read_by_value() -> None:
    assert 0.9 < NoiseLevels(made("ddim", None)).read(981).levels[0] < 1
    assert NoiseLevels(made("flow euler", None)).read(250.0).levels == pytest.approx([0.25])
    assert NoiseLevels(made("edm euler", None)).read(0.25 * torch.tensor(1.0).log()).levels == pytest.approx(
        [2 / 3], abs=1e-3
    )


def test_a_step_that_only_shares_the_value_range_is_no_view() -> None:
    scheduler = made("ddim", 10)
    own = scheduler.timesteps.clone()
    levels = NoiseLevels(scheduler)
    assert levels.read(own[4]).to_come == pytest.approx(levels_of(scheduler)[4:5])


def test_inference_mode_runs_too() -> None:
    with torch.inference_mode():
        scheduler = made("ddim", 10)
        levels = levels_of(scheduler)
    assert levels == levels_of(made("ddim", 10))


def test_steps_changed_in_place_are_read_anew() -> None:
    scheduler = made("ddim", 4)
    levels = NoiseLevels(scheduler)
    before = levels.read(scheduler.timesteps[0]).levels
    scheduler.timesteps[0] = 20
    assert levels.read(scheduler.timesteps[0]).levels == levels.read(20).levels != before


def test_every_preparation_of_the_scheduler_is_a_run_of_its_own() -> None:
    scheduler = made("heun", 4)
    levels = NoiseLevels(scheduler)
    first = {levels.read(t).run for t in scheduler.timesteps}
    scheduler.set_timesteps(4)
    second = {levels.read(t).run for t in scheduler.timesteps}
    assert len(first) == len(second) == 1
    assert first != second
    assert levels.read(scheduler.timesteps[0].clone()).run is None


class Renamed(diffusers.FlowMatchEulerDiscreteScheduler):
    """Flow matching by another name."""


def test_flow_matching_is_recognised_by_its_class_and_in_both_directions() -> None:
    scheduler: Any = Renamed(shift=3.0)
    scheduler.set_timesteps(5)
    assert levels_of(scheduler) == pytest.approx(scheduler.sigmas[:5].tolist())
    rising: Any = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    rising.set_timesteps(5)
    assert levels_of(rising) == pytest.approx((1 - rising.sigmas[:5]).tolist())


def test_a_scheduler_without_sigmas_is_not_known() -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(5)
    levels = NoiseLevels(scheduler)
    assert not levels.read(scheduler.timesteps[1]).known
    assert not levels.read(0.4).known


@pytest.mark.parametrize(("timestep", "known"), [
    (0, True), (999.0, True), (torch.tensor([20, 901]), True), (torch.tensor([20.5, 901]), False), (-1, False),
    (1000, False), (0.25, False), (float("inf"), False), (float("nan"), False),
])  # fmt: skip
def test_without_a_scheduler_only_whole_steps_are_known(timestep: Any, known: bool) -> None:
    assert NoiseLevels().read(timestep).known is known


def test_a_scheduler_that_was_never_prepared_has_no_sigmas_of_its_own() -> None:
    """DPM-Solver keeps its time steps falling and its σ rising until then."""
    alphas = made("dpm++").alphas_cumprod[900].item()
    expected = 1 / (1 + (alphas / (1 - alphas)) ** 0.5)
    assert NoiseLevels(made("dpm++", None)).read(900).levels == pytest.approx([expected], abs=1e-5)


# In a patched pipeline.


def watched(pipe: Any) -> Watching:
    """Patches a pipeline with a schedule that keeps the levels it sees."""
    schedule = Watching({0.0: {}})
    diffattn.patch(pipe, num_agents=8, agent_ratio=None, max_head_error=10.0, min_tokens=0, schedule=schedule)
    return schedule


@pytest.mark.slow
def test_a_scheduler_swapped_between_runs_is_the_one_that_is_read(make_pipeline: Callable[[str], Any]) -> None:
    pipe = make_pipeline("sd")
    schedule = watched(pipe)
    for scheduler in (pipe.scheduler, DPMSolverMultistepScheduler(**FLOW), EulerDiscreteScheduler(**SD)):
        schedule.levels.clear()
        pipe.scheduler = scheduler
        tiny.run(pipe)
        assert functools.reduce(operator.iadd, schedule.levels, []) == pytest.approx(levels_of(scheduler))


def test_img2img_strength_is_seen(make_pipeline: Callable[[str], Any]) -> None:
    pipe = make_pipeline("img2img")
    schedule = watched(pipe)
    tiny.run(pipe, strength=0.5, num_inference_steps=8)
    assert functools.reduce(operator.iadd, schedule.levels, []) == pytest.approx(levels_of(pipe.scheduler)[4:])


class CountReads(TorchFunctionMode):
    """Counts, per storage, the calls that bring a tensor's values to the host."""

    READS = ("tolist", "item", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "to", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[tuple[str, int]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS and args and isinstance(args[0], Tensor):
            self.reads[name, args[0].numel()] += 1
        return func(*args, **(kwargs or {}))


@every_scheduler
def test_a_step_that_is_a_view_is_never_read_from_the_device(name: str) -> None:
    scheduler = made(name, 10)
    levels = NoiseLevels(scheduler)
    with CountReads() as counted:
        for t in scheduler.timesteps:
            levels.read(t)
            levels.read(t.expand(2))
            levels.read(t[None])
    whole_runs = {size for _, size in counted.reads}
    assert 1 not in whole_runs
    assert 2 not in whole_runs
    assert counted.reads["tolist", len(scheduler.timesteps)] <= 2  # once per run, and once for a table of σ


def test_reading_a_value_is_seen_by_the_counter() -> None:
    with CountReads() as counted:
        NoiseLevels(made("ddim")).read(torch.tensor([5, 6]))
    assert counted.reads["tolist", 2] == 1
