"""The state of a run by names and whole tensors, whether the model is sharded or not."""

from collections.abc import Mapping

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every process must ask), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name."""
    return {name: whole(t) for name, t in model.state_dict().items()}


def ema_tensors(ema: EMAModel, model: nn.Module) -> dict[str, Tensor]:
    """The averaged weights by the names of the model's parameters."""
    return {name: whole(t) for (name, _), t in zip(model.named_parameters(), ema.shadow_params, strict=True)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """ "parameter/exp_avg" and so on; parameters that never had a gradient have no state."""
    return {
        f"{name}/{key}": whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore(
    model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put back what the functions above gave; raises `KeyError` if the model has other parameters."""
    own = model.state_dict()
    for name, target in own.items():
        _put(target, tensors["model"][name])
    for (name, parameter), average in zip(model.named_parameters(), ema.shadow_params, strict=True):
        _put(average, tensors["ema"][name])
        prefix = f"{name}/"
        found = {k.removeprefix(prefix): v for k, v in tensors["optimizer"].items() if k.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {k: _state_like(parameter, v) for k, v in found.items()}


def _state_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A piece of optimizer state placed as its parameter is; step counts are scalars."""
    if value.shape != parameter.shape:
        return value.clone()
    state = torch.empty_like(parameter)
    _put(state, value)
    return state
