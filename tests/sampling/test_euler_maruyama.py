"""The SDE scheduler: against the fixtures, with recorded noise, and against the ODE."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.sampling_cases import official, sampling_case, variants
from torch import Tensor

from diffattn.sampling import DIFFUSIONS, PATHS, EulerMaruyamaScheduler

FORMS = {"inccreasing-decreasing": "increasing-decreasing"}


def configured(case_params: dict[str, Any], variant: dict[str, Any]) -> EulerMaruyamaScheduler:
    last_step = variant["last_step"]
    return EulerMaruyamaScheduler(
        path=case_params["path_type"].lower(),
        diffusion=str(FORMS.get(variant["diffusion_form"], variant["diffusion_form"])),
        diffusion_norm=variant["diffusion_norm"],
        last_step=last_step and last_step.lower(),
        last_step_size=variant["last_step_size"],
    )


def run(scheduler: Any, steps: int, x: Tensor, **kwargs: Any) -> Tensor:
    """On the field v = 1 - x."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x - 1, timestep, x, **kwargs).prev_sample
    return x


@variants("sit_sde_linear", "sit_sde_gvp")
def test_samples_equal_the_reference_with_its_noise(name: str, variant: str) -> None:
    case = sampling_case(name)
    model, options = official(case), case.params["variants"][variant]
    scheduler = configured(case.params, options)
    grid_points = case.params["num_steps"]
    evaluations = grid_points - 1 if options["last_step"] is None else grid_points
    scheduler.set_timesteps(evaluations)
    x, noise = case["in.z"], [*case["in.noise"], None]
    for i, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            v = model(x, (1 - timestep / 1000).expand(len(x)), case["in.y"]).sample
        x = scheduler.step(-v, timestep, x, noise=noise[i]).prev_sample  # type: ignore[union-attr]
    case.assert_close(x, f"out.{variant}.final")


def test_the_recorded_noise_is_what_a_generator_draws() -> None:
    case = sampling_case("sit_sde_gvp")
    x, generator = case["in.z"], torch.Generator().manual_seed(case.params["torch_seed"])
    scheduler: Any = EulerMaruyamaScheduler(path="gvp")
    scheduler.set_timesteps(6)
    first = scheduler.timesteps[0]
    drawn = scheduler.step(-x, first, x, generator=generator).prev_sample
    scheduler.set_timesteps(6)
    assert drawn.equal(scheduler.step(-x, first, x, noise=case["in.noise"][0]).prev_sample)


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", None])
@pytest.mark.parametrize("path", PATHS)
def test_without_diffusion_it_is_the_ode(path: str, last_step: str | None) -> None:
    """D = 0 on v = 1 - x, whose flow leads to 1 - (1 - x₀)/e."""
    start = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    scheduler = EulerMaruyamaScheduler(path=path, diffusion_norm=0.0, last_step=last_step, last_step_size=1e-3)
    found = run(scheduler, 200, start)
    torch.testing.assert_close(found, torch.full_like(found, 1 - torch.e**-1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_diffusion_leads_to_the_data(path: str, diffusion: str) -> None:
    """Data of variance ¼ have the velocity E[v | x] in closed form; a sample of them comes out whatever D.

    The last step is the ODE's: "mean" would go along the score without the noise that belongs to it.
    """
    interpolant = PATHS[path]
    scheduler = EulerMaruyamaScheduler(path=path, diffusion=diffusion, last_step="euler")
    scheduler.set_timesteps(200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20_000, generator=generator)
    for timestep in scheduler.timesteps:
        t = 1 - timestep.double() / 1000
        a, s, da, ds = (f(t) for f in (interpolant.alpha, interpolant.sigma, interpolant.d_alpha, interpolant.d_sigma))
        slope = (a * da / 4 + s * ds) / (a**2 / 4 + s**2)
        x = scheduler.step(-slope * x, timestep, x, generator=generator).prev_sample  # type: ignore[union-attr]
    assert x.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("diffusion", "start"), [("sigma", 0.0), ("sbdm", 0.01)])
def test_grid_with_a_last_step(diffusion: str, start: float) -> None:
    scheduler = EulerMaruyamaScheduler(diffusion=diffusion)
    scheduler.set_timesteps(4)
    expected = 1000 * (1 - torch.linspace(start, 0.96, 4))
    torch.testing.assert_close(scheduler.timesteps, expected)
    assert scheduler.timesteps.dtype == torch.float32


def test_grid_without_a_last_step() -> None:
    scheduler = EulerMaruyamaScheduler(num_train_timesteps=100, last_step=None)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([100, 75, 50, 25])
    assert len(scheduler) == 100


def test_the_last_step_draws_no_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    scheduler = EulerMaruyamaScheduler()
    scheduler.set_timesteps(2)
    x = torch.ones(1, 1, 2, 2)
    states = []
    for timestep in scheduler.timesteps:
        x = scheduler.step(-x, timestep, x, generator=generator).prev_sample  # type: ignore[union-attr]
        states.append(generator.get_state())
    assert states[0].equal(states[1])
    assert not states[0].equal(torch.Generator().manual_seed(0).get_state())


def test_a_generator_per_sample_makes_samples_independent() -> None:
    start = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    together = run(EulerMaruyamaScheduler(), 5, start, generator=[torch.Generator().manual_seed(s) for s in range(3)])
    for seed in range(3):
        alone = run(EulerMaruyamaScheduler(), 5, start[seed : seed + 1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(together[seed : seed + 1], alone)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("last_step", ["mean", "tweedie"])
def test_state_is_at_least_single_precision(given: torch.dtype, kept: torch.dtype, last_step: str) -> None:
    found = run(EulerMaruyamaScheduler(last_step=last_step), 3, torch.zeros(1, 1, 2, 2, dtype=given))
    assert found.dtype == kept
    assert found.isfinite().all()


def test_steps_can_begin_later_and_are_found_by_their_time_step() -> None:
    scheduler = EulerMaruyamaScheduler()
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for begin in (None, 3):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        found.append(scheduler.step(-x, scheduler.timesteps[3], x, noise=x).prev_sample)  # type: ignore[union-attr]
        assert (scheduler.begin_index, scheduler.step_index) == (begin, 4)
    assert found[0].equal(found[1])


def test_scale_noise_is_the_path() -> None:
    data, noise = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = EulerMaruyamaScheduler(path="gvp")
    steps = torch.tensor([1000.0, 250.0])
    expected = PATHS["gvp"].interpolate(data, noise, torch.tensor([0.0, 0.75]))
    torch.testing.assert_close(scheduler.scale_noise(data, steps, noise), expected)
    assert scheduler.scale_model_input(data, 3).equal(data)


def test_configuration_is_saved_and_taken_over(tmp_path: Any) -> None:
    scheduler = EulerMaruyamaScheduler(path="gvp", diffusion="linear", diffusion_norm=2.0, last_step=None)
    scheduler.save_pretrained(tmp_path)
    loaded: Any = EulerMaruyamaScheduler.from_pretrained(tmp_path)
    for name, value in scheduler.config.items():
        assert name.startswith("_") or loaded.config[name] == value
    taken: Any = EulerMaruyamaScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    assert taken.config.path == "linear"


def test_tuple_instead_of_output() -> None:
    scheduler = EulerMaruyamaScheduler()
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2)
    output = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(path="vp"), "path must be one of linear, gvp, got 'vp'"),
        (dict(diffusion="sgima"), "diffusion must be one of sigma, constant, .*, got 'sgima'"),
        (dict(last_step="Mean"), "last_step must be one of mean, euler, tweedie, None, got 'Mean'"),
        (dict(diffusion_norm=-1.0), "diffusion_norm must be at least 0, got -1.0"),
        (dict(last_step_size=0.0), "last_step_size must be between 0 and 1, got 0.0"),
        (dict(sbdm_start=0.97), "sbdm_start must be between 0 and 1 - last_step_size, got 0.97"),
    ],
)
def test_bad_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EulerMaruyamaScheduler(**options)


@pytest.mark.parametrize(("last_step", "steps", "fewest"), [("mean", 1, 2), (None, 0, 1)])
def test_too_few_steps(last_step: str | None, steps: int, fewest: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be at least {fewest}, got {steps}"):
        EulerMaruyamaScheduler(last_step=last_step).set_timesteps(steps)


def test_steps_out_of_turn() -> None:
    scheduler, x = EulerMaruyamaScheduler(), torch.ones(1, 2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"one of scheduler.timesteps, got 700"):
        scheduler.step(x, 700.0, x)
    run(scheduler, 2, x)
    with pytest.raises(ValueError, match="all 2 steps have been taken"):
        scheduler.step(x, scheduler.timesteps[-1], x)
