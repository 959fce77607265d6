"""The state of a run returns to the devices of its parameters."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from diffattn.training import state


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_restored_state_lies_on_the_device_of_its_parameter() -> None:
    """Step counts too: a fused optimizer takes them from there. The meta device stands for another one."""
    model = nn.Linear(3, 2)
    optimizer, ema = trained(model), EMAModel(model.parameters())
    tensors = {
        "model": state.model_tensors(model),
        "ema": state.ema_tensors(ema, model),
        "optimizer": state.optimizer_tensors(optimizer, model),
    }
    with torch.device("meta"):
        other = nn.Linear(3, 2)
    restored = torch.optim.AdamW(other.parameters(), fused=False)
    state.restore(other, EMAModel(other.parameters()), restored, tensors)
    for parameter in other.parameters():
        found = restored.state[parameter]
        assert set(found) == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in found.values()} == {"meta"}


def test_a_restored_optimizer_goes_on_as_the_first_one() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, ema = trained(model), EMAModel(model.parameters())
    tensors = {
        "model": state.model_tensors(model),
        "ema": state.ema_tensors(ema, model),
        "optimizer": {k: v.clone() for k, v in state.optimizer_tensors(optimizer, model).items()},
    }
    restored = torch.optim.AdamW(other.parameters(), fused=True)
    state.restore(other, EMAModel(other.parameters()), restored, tensors)
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = same.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    restored.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert tensors["optimizer"]["weight/step"] == 1  # what was loaded is not what is counted on


def test_who_does_not_keep_gets_nothing() -> None:
    model = nn.Linear(3, 2)
    assert state.model_tensors(model, keep=False) == {}
