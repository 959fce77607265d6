"""`pipelines/training_loop.py`: what all small models' training shares."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

from training_loop import STOPPED, Budget, LoopConfig, Losses, Progress, Trainee, batch_indices, train

CFG = LoopConfig(Budget(samples=20), batch=2, clip=1.0, save_every=1e9)


def trainee(budget_rate: float = 0.1) -> Trainee:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ema = nn.Linear(4, 1), nn.Linear(4, 1)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    return Trainee(model, optimizer, lambda done: budget_rate * (1.1 - done), ema.requires_grad_(False))


def loss_of(model: nn.Module, step: int, rng: torch.Generator) -> Losses:
    x = torch.randn(2, 4, generator=rng)
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_and_a_resumed_one_equals_an_uninterrupted_one(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trainee()
    train("whole", whole, loss_of, CFG, tmp_path / "whole.pt")

    def stopping(model: nn.Module, step: int, rng: torch.Generator) -> Losses:
        if step == 3:
            signal.raise_signal(number)
        return loss_of(model, step, rng)

    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train("half", trainee(), stopping, CFG, tmp_path / "half.pt")
    assert stopped.value.code == STOPPED
    assert signal.getsignal(number) == handler
    assert "half: stopped and saved at step 4" in capsys.readouterr().out
    again = trainee()
    again.resume(tmp_path / "half.pt", CFG)
    assert (again.progress.step, again.progress.samples) == (4, 8)
    train("half", again, loss_of, CFG, tmp_path / "half.pt")
    for one, two in ((whole.model, again.model), (whole.ema, again.ema)):
        assert one is not None
        assert two is not None
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key])
    assert again.progress.samples == whole.progress.samples == 20


def test_budgets() -> None:
    progress = Progress(step=5, seconds=30, samples=80)
    assert progress.done(Budget(steps=10)) == 0.5
    assert progress.done(Budget(samples=320)) == 0.25
    assert progress.done(Budget(minutes=1)) == 0.5
    with pytest.raises(ValueError, match="training needs a budget: steps, samples or minutes"):
        Budget()
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Budget(samples=0)


@pytest.mark.parametrize("progress", [{"step": 3, "seconds": 1.0}, {"step": 3, "seconds": 1.0, "samples": 6}])
def test_checkpoints_written_before_progress_had_all_its_fields(tmp_path: Path, progress: dict[str, float]) -> None:
    old = trainee()
    old.save(tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt", weights_only=True)
    torch.save({**state, "progress": progress}, tmp_path / "old.pt")
    again = trainee()
    again.resume(tmp_path / "old.pt", CFG)
    assert again.progress == Progress(step=3, seconds=1.0, samples=6)


def test_nothing_is_saved_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    broken = lambda model, step, rng: {"loss": loss_of(model, step, rng)["loss"] * torch.nan}  # noqa: E731
    with pytest.raises(ValueError, match="the loss is nan at step 10"):
        train("broken", trainee(), broken, CFG, tmp_path / "broken.pt")
    assert not list(tmp_path.iterdir())


def test_every_picture_comes_once_an_epoch() -> None:
    epochs = [torch.cat([batch_indices(4 * e + step, 2, 8, seed=0) for step in range(4)]) for e in (0, 1)]
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert not torch.equal(*epochs)
