"""The interpolants and diffusion forms, against the fixtures and against their own definitions."""

import math

import pytest
import torch
from support.sampling_cases import official, sampling_case
from torch import Tensor

from diffattn.sampling import DIFFUSIONS, PATHS, Path

THEIRS = {"linear": "Linear", "gvp": "GVP"}
FORMS = {name: name for name in DIFFUSIONS} | {"increasing-decreasing": "inccreasing-decreasing", "sbdm": "SBDM"}

every_path = pytest.mark.parametrize("name", PATHS)


def sample(batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, batch, 2, 4, 4, generator=generator, dtype=dtype)
    return data, noise


@every_path
@pytest.mark.parametrize("coefficient", ["alpha", "sigma", "d_alpha", "d_sigma"])
def test_coefficients_equal_the_reference(name: str, coefficient: str) -> None:
    case = sampling_case("sit_paths")
    case.assert_close(getattr(PATHS[name], coefficient)(case["in.t"]), f"out.{THEIRS[name]}.{coefficient}")


@every_path
def test_score_and_noise_equal_the_reference(name: str) -> None:
    case = sampling_case("sit_paths")
    v, x, t = case["in.v"], case["in.x"], case["in.t"]
    case.assert_close(PATHS[name].score(v, x, t), f"out.{THEIRS[name]}.score_from_velocity")
    case.assert_close(PATHS[name].noise_estimate(v, x, t), f"out.{THEIRS[name]}.noise_from_velocity")


@every_path
def test_velocity_drift_and_its_variance_equal_the_reference(name: str) -> None:
    """The probability flow of the forward SDE, v = (α̇/α)x + D·score, with the drift -(α̇/α)x and D of `sbdm`."""
    case, path = sampling_case("sit_paths"), PATHS[name]
    s, x, t = case["in.v"], case["in.x"], case["in.t"]  # the reference takes in.v for the score here
    ratio, D = path.d_alpha(t) / path.alpha(t), DIFFUSIONS["sbdm"](path, t, 1.0)
    case.assert_close(-ratio[:, None] * x, f"out.{THEIRS[name]}.drift")
    case.assert_close(D, f"out.{THEIRS[name]}.drift_var")
    v = f"out.{THEIRS[name]}.velocity_from_score"
    case.assert_close(ratio[:, None] * x + D[:, None] * s, v)
    torch.testing.assert_close(path.score(case[v].double(), x.double(), t.double()), s.double(), atol=1e-3, rtol=1e-3)


@every_path
@pytest.mark.parametrize("form", [form for form in DIFFUSIONS if form != "constant"])
def test_diffusion_forms_equal_the_reference(name: str, form: str) -> None:
    case = sampling_case("sit_paths")
    D = DIFFUSIONS[form](PATHS[name], case["in.t"], case.params["diffusion_norm"])
    case.assert_close(D, f"out.{THEIRS[name]}.diffusion_{FORMS[form]}")


def test_constant_diffusion() -> None:
    t = torch.tensor([0.0, 0.5])
    assert DIFFUSIONS["constant"](PATHS["linear"], t, 0.3).tolist() == pytest.approx([0.3, 0.3])


@every_path
def test_interpolation_velocity_and_loss_equal_the_reference(name: str) -> None:
    case, path = sampling_case("sit_loss"), PATHS[name]
    data, noise, t = case["in.x1"], case["in.x0"], case["in.t"]
    x, v = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    case.assert_close(x, f"out.{THEIRS[name]}.xt")
    case.assert_close(v, f"out.{THEIRS[name]}.ut")
    with torch.no_grad():
        predicted = official(case)(x, t, case["in.y"]).sample
    if name == "linear":  # the only prediction that was recorded
        case.assert_close(predicted, "out.Linear.pred")
    case.assert_close((predicted - v).square().flatten(1).mean(1), f"out.{THEIRS[name]}.velocity.None.loss")


@every_path
def test_derivatives_are_those_of_the_amplitudes(name: str) -> None:
    path = PATHS[name]
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    for amplitude, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (found,) = torch.autograd.grad(amplitude(t).sum(), t)
        torch.testing.assert_close(derivative(t), found)


@every_path
@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_true_velocity_gives_back_data_and_noise_at_both_ends_too(name: str, at: float, shape: tuple[int, ...]) -> None:
    path, (data, noise) = PATHS[name], sample()
    t = torch.full(shape, at, dtype=torch.float64)
    x, v = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    torch.testing.assert_close(path.data_estimate(v, x, t), data)
    torch.testing.assert_close(path.noise_estimate(v, x, t), noise)
    if at < 1:
        torch.testing.assert_close(path.score(v, x, t), -noise / path.sigma(torch.tensor(at, dtype=torch.float64)))


@every_path
def test_every_sample_has_its_own_time(name: str) -> None:
    path, (data, noise) = PATHS[name], sample()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = path.score(path.velocity(data, noise, t), path.interpolate(data, noise, t), t)
    for i in range(3):
        x, v = (f(data[i], noise[i], t[i]) for f in (path.interpolate, path.velocity))
        torch.testing.assert_close(together[i], path.score(v, x, t[i]))


@every_path
def test_the_ends_are_exact_in_single_precision(name: str) -> None:
    path, ends = PATHS[name], torch.tensor([0.0, 1.0])
    assert path.alpha(ends).tolist() == [0, 1]
    assert path.sigma(ends).tolist() == [1, 0]


@every_path
def test_only_the_score_at_the_data_is_infinite(name: str) -> None:
    path, (data, noise) = PATHS[name], sample(dtype=torch.float32)
    for at in (0.0, 1.0):
        t = torch.full((3,), at)
        for estimate in (path.data_estimate, path.noise_estimate):
            assert estimate(data, noise, t).isfinite().all()
    assert path.score(data, noise, torch.zeros(3)).isfinite().all()
    assert path.score(data, noise, torch.ones(3)).isinf().all()


def test_the_diffusion_of_score_based_models_is_infinite_at_the_noise_only() -> None:
    for path in PATHS.values():
        D = DIFFUSIONS["sbdm"](path, torch.tensor([0.0, 0.01, 1.0]), 1.0)
        assert D.isinf().tolist() == [True, False, False]
        assert D[2] == 0


def test_gvp_preserves_variance() -> None:
    path: Path = PATHS["gvp"]
    t = torch.linspace(0, 1, 7)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(7))
    assert path.d_alpha(torch.tensor(0.0)).item() == pytest.approx(math.pi / 2)
