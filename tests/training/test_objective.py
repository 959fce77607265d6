"""The objective: the loss, its weights, and random numbers that follow from (seed, step)."""

import pytest
import torch
from support.tiny_dit import inputs, run, tiny_dit

from diffattn.sampling.paths import PATHS
from diffattn.training.config import ObjectiveConfig
from diffattn.training.objective import Draw, LossBins, VelocityLoss, draw, min_snr_weight

SHAPE = (2, 4, 4)


@pytest.mark.parametrize(("path", "times"), [("linear", (1.0, -1.0)), ("gvp", None)])
def test_the_loss_is_the_squared_error_of_the_velocity(path, times) -> None:
    """Written out; parity with the published loss is tested with the paths."""
    model = tiny_dit()
    data, _, y = inputs()
    t, noise = torch.tensor([0.2, 0.7]), torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    at = t.view(2, 1, 1, 1)
    a, s = (at, 1 - at) if path == "linear" else (torch.sin(at * torch.pi / 2), torch.cos(at * torch.pi / 2))
    da, ds = times or (s * torch.pi / 2, -a * torch.pi / 2)
    with torch.no_grad():
        loss, unweighted = VelocityLoss(ObjectiveConfig(path=path), null_class=5)(
            model, data, y, Draw(t, noise, torch.zeros(2, dtype=torch.bool), None)
        )
    error = run(model, a * data + s * noise, t, y) - (da * data + ds * noise)
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3)))
    assert torch.equal(loss, unweighted)


def test_draws_follow_from_seed_and_step() -> None:
    config = ObjectiveConfig()
    one, again = draw(config, 0, 5, 8, SHAPE, (4, 16)), draw(config, 0, 5, 8, SHAPE, (4, 16))
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.t, again.t)
    assert one.num_mediators == again.num_mediators
    for other in (draw(config, 1, 5, 8, SHAPE, (4, 16)), draw(config, 0, 6, 8, SHAPE, (4, 16))):
        assert not torch.equal(one.noise, other.noise)
        assert not torch.equal(one.t, other.t)


def test_numbers_of_mediators_are_drawn_alike() -> None:
    numbers = [draw(ObjectiveConfig(), 0, step, 1, (1, 1, 1), (4, 16, 64)).num_mediators for step in range(600)]
    assert all(150 < numbers.count(n) < 250 for n in (4, 16, 64))
    assert draw(ObjectiveConfig(), 0, 0, 1, (1, 1, 1), ()).num_mediators is None


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_times_and_label_dropout_have_their_distributions(time) -> None:
    drawn = draw(ObjectiveConfig(time=time, label_dropout=0.2), 0, 0, 20_000, (1, 1, 1), ())
    assert drawn.t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.t.var().item() == pytest.approx(1 / 12 if time == "uniform" else 0.0434, abs=0.004)
    assert drawn.drop.float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_dropped_labels_become_the_null_class() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append(y)
            return DiTOutput(x)

    class DiTOutput:
        def __init__(self, sample):
            self.sample = sample

    drop = torch.tensor([True, False])
    VelocityLoss(ObjectiveConfig(), null_class=9)(
        Spy(), torch.zeros(2, 1, 2, 2), torch.tensor([3, 4]), Draw(torch.rand(2), torch.zeros(2, 1, 2, 2), drop, None)
    )
    assert seen[0].tolist() == [9, 4]


@pytest.mark.parametrize("name", PATHS)
def test_min_snr_weights_the_error_of_the_data_estimate(name) -> None:
    """Weight times the velocity's squared error is min(SNR, γ) times the data estimate's, up to a constant."""
    path, gamma = PATHS[name], 5.0
    t = torch.linspace(0.01, 0.99, 50)
    data, noise, off = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0))
    x, v = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    data_error = (path.data_estimate(v + off, x, t) - data).square().mean(1)
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    ratio = min_snr_weight(path, t, gamma) * off.square().mean(1) / (snr.clamp(max=gamma) * data_error)
    assert torch.allclose(ratio, ratio[0].expand(50), rtol=1e-3)


def test_bins_average_losses_by_time_and_begin_anew() -> None:
    bins = LossBins(4, torch.device("cpu"))
    bins.add(torch.tensor([0.0, 0.1, 0.3, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert bins.read(bins.sums.clone()) == {"loss/t0-0.25": 2.0, "loss/t0.25-0.5": 5.0, "loss/t0.75-1": 7.0}
    assert not bins.sums.any()


def test_every_bin_has_a_name_of_its_own() -> None:
    for number in (10, 100, 200, 1000):
        bins = LossBins(number, torch.device("cpu"))
        assert len(bins.read(torch.ones(2, number))) == number
